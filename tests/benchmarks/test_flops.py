"""The formulas against values worked out by hand."""

import torch

from benchmarks import flops


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


def test_the_peak_of_a_cpu_is_measured():
    peak, source = flops.peak_flops(torch.device("cpu"))
    assert peak > 1e6
    assert source.startswith("measured")
