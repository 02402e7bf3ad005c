"""Stochastic depth drops samples, not the packed row they share."""

import pytest
import torch

from flextok.attention.layout import layout_of
from flextok.model.layers.drop_path import DropPath


def test_each_sample_of_a_packed_row_is_dropped_or_kept_whole():
    layout = layout_of([(3, 2)] * 32 + [(1, 1)] * 32, total=256)
    torch.manual_seed(0)
    out = DropPath(0.5).train()(torch.ones(1, 256, 4), layout)[0]
    per_sample = [rows.unique().tolist() for rows in out[: layout.num_tokens].split(list(layout.sample_lengths))]
    assert all(values in ([0.0], [2.0]) for values in per_sample)
    assert 16 < sum(values == [2.0] for values in per_sample) < 48


def test_evaluation_changes_nothing():
    x = torch.randn(2, 3, 4)
    assert DropPath(0.5).eval()(x) is x


@pytest.mark.parametrize("drop_prob", [-0.1, 1.0])
def test_impossible_rates_are_refused(drop_prob):
    with pytest.raises(ValueError, match="drop_prob"):
        DropPath(drop_prob)
