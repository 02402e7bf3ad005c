"""Packed rows of every kind, for tests that hold for all of them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from flextok.attention.layout import SequenceLayout
from flextok.attention.reference import reference_attention

MODES = ("full", "causal", "causal_last")


@st.composite
def layout_arguments(draw, modes=MODES, counts=True, most_samples=7):
    """Few samples and many, equal and ragged, empty sub-sequences and samples, hidden tokens, padding, counts."""
    one_sample = st.tuples(*[st.integers(0, 5)] * draw(st.integers(1, 3)))
    lengths = draw(st.lists(one_sample, min_size=1, max_size=most_samples))
    if draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    mode = draw(st.sampled_from(modes))
    keep_last = draw(st.none() | st.tuples(*[st.integers(0, 7)] * len(lengths)))
    last_counts = None
    if counts and mode == "full" and keep_last is None:
        last_counts = draw(st.none() | st.tuples(*[st.integers(1, 9)] * len(lengths)))
    num_tokens = sum(map(sum, lengths))
    padding = draw(st.integers(0 if num_tokens else 1, 6))
    total = draw(st.none() | st.just(num_tokens + padding)) if num_tokens else padding
    return {"lengths": tuple(lengths), "mode": mode, "keep_last": keep_last, "total": total, "last_counts": last_counts}


def random_qkv(layout, dtype=torch.float32, *, heads=2, head_dim=4, requires_grad=False):
    generator = torch.Generator().manual_seed(layout.row_length)
    shape = (3, 1, heads, layout.row_length, head_dim)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return [x.requires_grad_(requires_grad) for x in values.unbind()]


def expected_attention(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, *, scale: float) -> Tensor:
    """The reference; a counted key has log(count) added to its score, written down once more and by hand."""
    bias, end = torch.zeros(layout.row_length, dtype=q.dtype), 0
    for length, count in zip(layout.sample_lengths, layout.last_counts or [1] * len(layout.lengths), strict=True):
        end += length
        if length:
            bias[end - 1] = torch.tensor(count, dtype=torch.float64).log()
    dense, bias = layout.dense_mask(q.device), bias.to(q.device)
    return reference_attention(q, k, v, dense, scale=scale, score_mod=lambda score, b, h, q_idx, kv_idx: score + bias)
