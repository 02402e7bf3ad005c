"""Calls of variable-length attention mean what the layout means, by a slow kernel that does what is documented."""

import pytest
import torch
from hypothesis import given, settings

from flextok.attention.backends import varlen
from flextok.attention.backends.varlen import plan_varlen
from flextok.attention.engine import attend
from flextok.attention.layout import SequenceLayout, layout_of
from tests.attention.layouts import MODES, expected_attention, layout_arguments, random_qkv
from tests.support import max_difference

CPU = torch.device("cpu")
SCALE = 0.7


def slow_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`torch.nn.attention.varlen.varlen_attn`, sequence by sequence.

    Query i of n among m keys sees all keys, or with `window_size` (-1, 0) those up to i + m - n: causal masks are
    aligned to the last key. A query that sees none gives zeros.
    """
    assert window_size in [(-1, -1), (-1, 0)]
    for x, starts, longest in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k), (value, cu_seq_k, max_k)):
        assert x.ndim == 3
        assert x.is_contiguous()
        assert (starts.dtype, starts.ndim) == (torch.int32, 1)
        assert starts[0] == 0
        assert starts[-1] == len(x), "all tokens belong to a sequence"
        assert starts.diff().max() <= longest
        assert starts.diff().min() >= 0
    assert len(cu_seq_q) == len(cu_seq_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    outputs = []
    for q, k, v in zip(*map(split, (query, key, value), (cu_seq_q, cu_seq_k, cu_seq_k)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if window_size == (-1, 0):
            row, column = torch.arange(len(q))[:, None], torch.arange(len(k))
            scores = scores.masked_fill(column > row + len(k) - len(q), float("-inf"))
        weights = scores.softmax(-1).nan_to_num()
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def split(x, starts):
    return x.split(starts.diff().tolist())


@pytest.fixture(autouse=True)
def _slow_kernel(request, monkeypatch):
    if "gpu" not in request.keywords:
        monkeypatch.setattr(varlen, "varlen_attn", slow_varlen_attn)


def attend_by_plan(inputs, layout):
    return plan_varlen(layout, CPU).attend(*inputs, SCALE)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60)
@given(arguments=layout_arguments(counts=False))
def test_values_and_gradients_are_those_of_the_reference(mode, arguments):
    layout = SequenceLayout(**arguments | {"mode": mode})
    inputs = random_qkv(layout, torch.float64, requires_grad=True)
    expected, out = expected_attention(*inputs, layout, scale=SCALE), attend_by_plan(inputs, layout)
    assert out.shape == expected.shape
    assert max_difference(out, expected) < 1e-12
    assert (out[:, :, ~layout.dense_mask().any(-1)] == 0).all()
    by_form = [torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected)]
    for mine, theirs in zip(*by_form, strict=True):
        assert max_difference(mine, theirs) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_neighbouring_heads_may_share_keys(mode):
    layout = layout_of([(4, 2), (3, 1)], mode=mode)
    q, k, v = (torch.randn(1, heads, 10, 4) for heads in (6, 2, 2))
    expected = expected_attention(q, k, v, layout, scale=SCALE)
    assert max_difference(attend_by_plan((q, k, v), layout), expected) < 1e-5


CALLS = {
    "full": (layout_of([(4, 2), (3, 1)]), [(10, 10, False)]),
    "causal": (layout_of([(4, 2), (3, 1)], mode="causal"), [(10, 10, True)]),
    "causal_last": (layout_of([(4, 2), (3, 1)], mode="causal_last"), [(7, 7, False), (3, 10, True)]),
    "nothing_before": (layout_of([(0, 2), (0, 1)], mode="causal_last"), [(3, 3, True)]),
    "nothing_last": (layout_of([(4, 0), (3, 0)], mode="causal_last"), [(7, 7, False)]),
    "hidden": (layout_of([(4, 2), (3, 1)], keep_last=(1, 0), total=16), [(8, 8, False)]),
    "last_hidden": (layout_of([(4, 2), (3, 1)], mode="causal_last", keep_last=(0, 0)), [(7, 7, False)]),
    "all_hidden": (layout_of([(0, 2), (0, 1)], keep_last=(0, 0)), []),
}


@pytest.mark.parametrize(("layout", "calls"), CALLS.values(), ids=CALLS)
def test_calls_hold_visible_tokens_only_and_none_is_empty(layout, calls, monkeypatch):
    """One call, two for `causal_last`: `(queries, keys, is causal)` of each."""
    seen = []

    def noted(query, key, *rest, window_size, **options):
        seen.append((len(query), len(key), window_size == (-1, 0)))
        return slow_varlen_attn(query, key, *rest, window_size=window_size, **options)

    monkeypatch.setattr(varlen, "varlen_attn", noted)
    out = attend_by_plan(random_qkv(layout), layout)
    assert seen == calls
    assert out.shape == (1, 2, layout.row_length, 4)


def test_a_row_without_gaps_is_not_copied():
    plan = plan_varlen(layout_of([(4, 2), (3, 1)]), CPU)
    assert all(tokens.rows is None for call in plan.calls for tokens in (call.queries, call.keys))


# --- on a GPU ---------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
GPU_LAYOUTS = {
    "equal": layout_of([(64, 64)] * 4),
    "ragged": layout_of([(64, n) for n in (1, 17, 64, 33, 5)]),
    "ragged_ordered": layout_of([(64, n) for n in (1, 17, 64, 33, 5)], mode="causal_last"),
    "causal": layout_of([(64, n) for n in (1, 17, 64, 33, 5)], mode="causal", total=640),
    "hidden": layout_of([(64, 64)] * 5, keep_last=(1, 17, 64, 0, 5), total=700),
    "hidden_ordered": layout_of([(60, 64), (64, 30)] * 3, mode="causal_last", keep_last=(1, 17, 64, 0, 5, 30)),
    "counted": layout_of([(64, 17)] * 4, last_counts=(48,) * 4),
    "counted_ragged": layout_of([(64, n) for n in (1, 17, 64, 33, 5)], last_counts=(64, 48, 1, 32, 60)),
    "empty": layout_of([(0, 0), (64, 64), (0, 3), (30, 0), (3, 3), (9, 1)]),
}
DTYPES = [torch.float32, torch.bfloat16]


def on_gpu(layout, dtype):
    inputs = random_qkv(layout, dtype, heads=4, head_dim=64)
    return [x.cuda().requires_grad_() for x in inputs]


def results(out, inputs):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["flex", "varlen", "sdpa", "auto"])
@pytest.mark.parametrize("layout", GPU_LAYOUTS.values(), ids=GPU_LAYOUTS)
def test_backends_agree_on_a_gpu_forward_and_backward(layout, backend, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    if backend == "varlen" and (dtype == torch.float32 or layout.last_counts is not None):
        pytest.skip("varlen: half precision, keys of one token each")
    inputs = on_gpu(layout, dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = results(expected_attention(*doubles, layout, scale=0.125), doubles)
    mine = results(attend(*inputs, layout, scale=0.125, backend=backend), inputs)
    by_reference = results(attend(*inputs, layout, scale=0.125, backend="reference"), inputs)
    for ours, theirs, right in zip(mine, by_reference, exact, strict=True):
        if dtype == torch.float32:
            assert max_difference(ours, theirs) < 1e-5
        else:
            errors = [float((x.double() - right).square().mean().sqrt()) for x in (ours, theirs)]
            assert errors[0] < 1.5 * errors[1]


@gpu
@pytest.mark.parametrize("layout", GPU_LAYOUTS.values(), ids=GPU_LAYOUTS)
def test_rows_that_see_nothing_give_zeros_on_a_gpu(layout):
    inputs = on_gpu(layout, torch.bfloat16)
    hidden = ~layout.dense_mask().any(-1)
    for result in results(attend(*inputs, layout, scale=0.125), inputs):
        assert result.isfinite().all()
        assert (result[:, :, hidden] == 0).all()
