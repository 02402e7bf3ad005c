"""A layout means what a triple loop says it means, in every form it can be asked for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flextok.attention.engine import attend
from flextok.attention.layout import SequenceLayout

CPU = torch.device("cpu")


@st.composite
def layout_arguments(draw):
    num_subsequences = draw(st.integers(1, 3))
    one_sample = st.tuples(*[st.integers(0, 5)] * num_subsequences).filter(any)
    lengths = draw(st.lists(one_sample, min_size=1, max_size=4))
    if draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    keep_last = draw(st.none() | st.tuples(*[st.integers(0, 7)] * len(lengths)))
    padding = draw(st.none() | st.integers(0, 6))
    total = None if padding is None else sum(map(sum, lengths)) + padding
    mode = draw(st.sampled_from(["full", "causal", "causal_last"]))
    return {"lengths": tuple(lengths), "mode": mode, "keep_last": keep_last, "total": total}


def naive_mask(layout):
    """Token q attends to token k: same sample, both alive, and the order rule."""
    tokens = []
    for sample, lengths in enumerate(layout.lengths):
        position = 0
        for subsequence, length in enumerate(lengths):
            is_last = subsequence == len(lengths) - 1
            for index in range(length):
                keep = length if layout.keep_last is None else layout.keep_last[sample]
                tokens.append((sample, position, is_last, not is_last or index < keep))
                position += 1
    row_length = len(tokens) if layout.total is None else layout.total
    mask = torch.zeros(row_length, row_length, dtype=torch.bool)
    for q, (q_sample, q_position, _, q_alive) in enumerate(tokens):
        for k, (k_sample, k_position, k_is_last, k_alive) in enumerate(tokens):
            ordered = {
                "full": True,
                "causal": k_position <= q_position,
                "causal_last": k_position <= q_position or not k_is_last,
            }[layout.mode]
            mask[q, k] = q_sample == k_sample and q_alive and k_alive and ordered
    return mask


def naive_attention(q, k, v, mask, scale):
    """One query at a time, over its visible keys only."""
    out = torch.zeros_like(v)
    for head in range(q.shape[1]):
        for row in range(q.shape[2]):
            seen = mask[row]
            if seen.any():
                scores = (k[0, head, seen] @ q[0, head, row]) * scale
                out[0, head, row] = scores.softmax(0) @ v[0, head, seen]
    return out


def random_qkv(layout, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(layout.lengths))
    shape = (3, 1, 2, layout.row_length, 4)
    return torch.randn(shape, generator=generator, dtype=dtype).unbind()


@given(layout_arguments())
def test_dense_mask_equals_the_triple_loop(arguments):
    layout = SequenceLayout(**arguments)
    assert torch.equal(layout.dense_mask(CPU), naive_mask(layout))


@given(layout_arguments())
def test_mask_mod_equals_the_triple_loop(arguments):
    layout = SequenceLayout(**arguments)
    mask_mod, zero = layout.mask_mod(CPU), torch.tensor(0)
    index = torch.arange(layout.row_length)
    assert torch.equal(mask_mod(zero, zero, index[:, None], index[None, :]), naive_mask(layout))


@given(layout_arguments())
def test_attention_under_a_layout_equals_naive_softmax(arguments):
    layout = SequenceLayout(**arguments)
    q, k, v = random_qkv(layout)
    expected = naive_attention(q, k, v, naive_mask(layout), scale=0.7)
    out = attend(q, k, v, layout, scale=0.7)
    assert out.shape == v.shape
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert (out[:, :, ~naive_mask(layout).any(-1)] == 0).all()


@given(layout_arguments())
def test_attention_under_the_dense_mask_equals_naive_softmax(arguments):
    layout = SequenceLayout(**arguments)
    q, k, v = random_qkv(layout)
    expected = naive_attention(q, k, v, naive_mask(layout), scale=0.7)
    out = attend(q, k, v, layout.dense_mask(CPU), scale=0.7)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@given(layout_arguments())
def test_gradients_under_a_layout_equal_those_under_the_dense_mask(arguments):
    layout = SequenceLayout(**arguments)
    by_form = []
    for mask in (layout, layout.dense_mask(CPU)):
        q, k, v = (x.clone().requires_grad_() for x in random_qkv(layout, torch.float64))
        out = attend(q, k, v, mask, scale=0.7)
        by_form.append(torch.autograd.grad(out.square().sum(), [q, k, v]))
    for from_layout, from_dense in zip(*by_form, strict=True):
        assert torch.isfinite(from_layout).all()
        torch.testing.assert_close(from_layout, from_dense, atol=1e-9, rtol=0)


@given(layout_arguments())
def test_samples_do_not_depend_on_their_neighbours(arguments):
    layout = SequenceLayout(**arguments)
    q, k, v = random_qkv(layout)
    together = attend(q, k, v, layout, scale=0.7)
    start = 0
    for i, lengths in enumerate(layout.lengths):
        rows = slice(start, start + sum(lengths))
        keep = None if layout.keep_last is None else layout.keep_last[i : i + 1]
        alone = SequenceLayout(lengths=(lengths,), mode=layout.mode, keep_last=keep)
        out = attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], alone, scale=0.7)
        torch.testing.assert_close(out, together[:, :, rows], atol=1e-5, rtol=0)
        start = rows.stop
    assert (together[:, :, start:] == 0).all()


def test_a_small_case_written_out():
    """Two patches and two registers, one register kept, one padding token."""
    layout = SequenceLayout(lengths=((2, 2),), mode="causal_last", keep_last=(1,), total=5)
    expected = [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert layout.dense_mask(CPU).int().tolist() == expected
