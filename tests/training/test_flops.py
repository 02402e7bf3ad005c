"""The formulas against values worked out by hand."""

import pytest

from flextok.attention.layout import layout_of
from flextok.training import flops


def test_a_linear_map_costs_two_forward_and_four_backward_per_weight_and_row():
    assert flops.linear_training_flops(parameters=10, rows=7) == 420


def test_full_pairs_are_squares_of_samples_not_of_the_row():
    assert flops.full_pairs([2, 3]) == 13


def test_causal_last_pairs_by_counting():
    # Patches 3 x 3; registers see 3 patches each; registers see 1, then 2 registers.
    assert flops.causal_last_pairs(3, 2) == 9 + 6 + 3
    assert flops.causal_last_pairs(3, 0) == 9
    assert flops.causal_last_pairs(0, 4) == 10


def test_attention_costs_four_per_width_and_pair_forward_and_eight_backward():
    assert flops.attention_training_flops(width=8, pairs=13) == 8 * 13 * (4 + 8)


def test_a_trunk_is_the_sum_of_its_parts():
    total = flops.trunk_training_flops(
        token_weights=10, tokens=5, sample_weights=100, samples=2, depth=3, width=8, pairs=13
    )
    assert total == 6 * 10 * 5 + 6 * 100 * 2 + 3 * 12 * 8 * 13


@pytest.mark.parametrize("mode", ["full", "causal", "causal_last"])
@pytest.mark.parametrize("keep_last", [None, (0, 3), (2, 1)])
def test_visible_pairs_are_those_of_the_mask(mode, keep_last):
    layout = layout_of([(4, 2), (3, 3)], mode=mode, keep_last=keep_last, total=14)
    assert flops.visible_pairs(layout) == int(layout.dense_mask().sum())


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_the_peak_goes_by_the_name_of_the_gpu(name, peak):
    assert flops.stated_peak(name)[0] == peak
    assert flops.stated_peak("Quadro") is None
