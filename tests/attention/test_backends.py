"""Every backend that runs here is the ten-line reference; what cannot run says so and names what can."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from flextok.attention import engine
from flextok.attention.engine import AttentionRequest, attend, plan_attention, record_backends
from flextok.attention.layout import SequenceLayout, layout_of
from flextok.attention.reference import reference_attention
from tests.attention.layouts import expected_attention, layout_arguments, random_qkv
from tests.support import max_difference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = ("sdpa", "reference", "flex")
SCALE = 0.7

every_backend = pytest.mark.parametrize("backend", HERE)
with_gradients = pytest.mark.parametrize("backend", ["sdpa", "reference", "auto"])


def gradients(out, inputs):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs)


# --- layouts ----------------------------------------------------------------------------------------------------------


@every_backend
@given(arguments=layout_arguments())
def test_forward_is_that_of_the_reference(backend, arguments):
    layout = SequenceLayout(**arguments)
    q, k, v = random_qkv(layout)
    out = attend(q, k, v, layout, scale=SCALE, backend=backend)
    assert out.shape == v.shape
    assert max_difference(out, expected_attention(q, k, v, layout, scale=SCALE)) < 1e-5
    assert (out[:, :, ~layout.dense_mask().any(-1)] == 0).all()


@with_gradients
@given(arguments=layout_arguments())
def test_gradients_are_those_of_the_reference(backend, arguments):
    layout = SequenceLayout(**arguments)
    inputs = random_qkv(layout, torch.float64, requires_grad=True)
    expected = expected_attention(*inputs, layout, scale=SCALE)
    out = attend(*inputs, layout, scale=SCALE, backend=backend)
    assert max_difference(out, expected) < 1e-12
    for mine, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert max_difference(mine, theirs) < 1e-12


@every_backend
@given(arguments=layout_arguments(), data=st.data())
def test_a_plan_for_some_queries_answers_them_as_the_whole_plan_does(backend, arguments, data):
    layout = SequenceLayout(**arguments)
    subsequences = data.draw(st.lists(st.integers(0, len(layout.lengths[0]) - 1), min_size=1, unique=True).map(sorted))
    needs_grad = backend != "flex"
    q, k, v = inputs = random_qkv(layout, torch.float64, requires_grad=needs_grad)
    request = AttentionRequest(layout, layout.row_length, layout.row_length, CPU, q.dtype, needs_grad)
    plan = plan_attention(request, backend)
    rows = layout.rows_of(subsequences, CPU)
    whole = plan.attend(q, k, v, SCALE).index_select(2, rows)
    some = plan.for_queries_of(subsequences)
    if some.takes_some_queries:
        out = some.attend(q.index_select(2, rows), k, v, SCALE)
    else:
        out = some.attend(q, k, v, SCALE).index_select(2, rows)
    assert out.shape == whole.shape
    assert max_difference(out, whole) < 1e-12
    if needs_grad:
        for mine, theirs in zip(gradients(out, inputs), gradients(whole, inputs), strict=True):
            assert max_difference(mine, theirs) < 1e-12


def test_padded_batches_take_some_queries():
    layout = LARGE["ordered"]
    request = AttentionRequest(layout, layout.row_length, layout.row_length, CPU, torch.float32, needs_grad=True)
    plan = plan_attention(request, "sdpa").for_queries_of([1])
    assert plan.takes_some_queries
    assert plan is plan_attention(request, "sdpa").for_queries_of([1]), "made once per layout"


@pytest.mark.parametrize("samples", [1, 3, 6], ids="{}_samples".format)
@pytest.mark.parametrize("lengths", [(0, 0), (0, 4)], ids=["empty", "hidden"])
@pytest.mark.parametrize("mode", ["full", "causal", "causal_last"])
@with_gradients
def test_nobody_sees_anything(backend, mode, lengths, samples):
    """As many different lengths as samples, so that they are neither one batch nor a few."""
    rows = tuple((0, lengths[1] and lengths[1] + i) for i in range(samples))
    layout = SequenceLayout(rows, mode, keep_last=(0,) * samples, total=64)
    inputs = random_qkv(layout, requires_grad=True)
    out = attend(*inputs, layout, scale=SCALE, backend=backend)
    assert (out == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(out, inputs))


LARGE = {
    "equal": layout_of([(32, 16)] * 4),
    "ragged": layout_of([(32, n) for n in (1, 5, 16, 9, 30, 2)]),
    "ordered": layout_of([(32, n) for n in (1, 5, 16, 9, 30, 2)], mode="causal_last"),
    "hidden": layout_of([(32, 16)] * 6, keep_last=(1, 16, 4, 9, 0, 2), total=300),
    "counted": layout_of([(32, 1)] * 4, last_counts=(255,) * 4),
    "counted_ragged": layout_of([(32, n) for n in (1, 5, 16, 9, 30, 2)], last_counts=(256, 12, 1, 240, 7, 255)),
}


def root_mean_square(difference):
    return float(difference.double().square().mean().sqrt())


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("layout", LARGE.values(), ids=LARGE)
def test_in_half_precision_the_error_is_that_of_rounding(backend, layout):
    q, k, v = random_qkv(layout, torch.bfloat16, heads=4, head_dim=16)
    exact = expected_attention(q.double(), k.double(), v.double(), layout, scale=0.25)
    by_reference = attend(q, k, v, layout, scale=0.25, backend="reference")
    out = attend(q, k, v, layout, scale=0.25, backend=backend)
    allowed = 1.5 * root_mean_square(by_reference - exact)
    assert root_mean_square(out - exact) < allowed


# --- equal tokens -----------------------------------------------------------------------------------------------------


@st.composite
def counted_layout_arguments(draw):
    lengths = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=7))
    counts = draw(st.tuples(*[st.integers(1, 9)] * len(lengths)).filter(lambda counts: max(counts) > 1))
    return {"lengths": lengths, "last_counts": counts, "total": sum(map(sum, lengths)) + draw(st.integers(0, 5))}


@pytest.mark.parametrize("backend", ["sdpa", "reference", "auto"])
@settings(max_examples=25)
@given(arguments=counted_layout_arguments())
def test_a_counted_token_is_that_many_equal_tokens(backend, arguments):
    """Values, and gradients: the one token gets what its copies would get together."""
    layout = layout_of(**arguments)
    counts, ends = torch.tensor(layout.last_counts), torch.tensor(layout.sample_lengths).cumsum(0)
    repeats = torch.ones(layout.row_length, dtype=torch.long)
    repeats[ends - 1] = counts
    rows = torch.arange(layout.row_length).repeat_interleave(repeats)
    lengths = [(*row[:-1], row[-1] - 1 + count) for row, count in zip(layout.lengths, layout.last_counts, strict=True)]
    repeated = layout_of(lengths, total=len(rows))

    inputs = random_qkv(layout, torch.float64, requires_grad=True)
    out = attend(*inputs, layout, scale=SCALE, backend=backend)
    expected = attend(*(x[:, :, rows] for x in inputs), repeated, scale=SCALE, backend=backend)
    assert max_difference(out[:, :, rows], expected) < 1e-12
    # The loss sees every copy, so that each of them has a gradient.
    for mine, theirs in zip(gradients(out[:, :, rows], inputs), gradients(expected, inputs), strict=True):
        assert max_difference(mine, theirs) < 1e-11


@torch.no_grad()
def test_flex_counts_equal_tokens_too():
    layout, repeated = layout_of([(2, 1), (3, 2)], last_counts=(5, 3)), layout_of([(2, 5), (3, 4)])
    rows = torch.tensor([0, 1, *[2] * 5, 3, 4, 5, 6, *[7] * 3])
    q, k, v = random_qkv(layout)
    out = attend(q, k, v, layout, scale=SCALE, backend="flex")
    expected = attend(*(x[:, :, rows] for x in (q, k, v)), repeated, scale=SCALE, backend="flex")
    assert max_difference(out[:, :, rows], expected) < 1e-6


def test_an_empty_sample_does_not_take_the_count_of_its_neighbour():
    counts = SequenceLayout(((0, 0), (2, 1), (0, 0)), last_counts=(1, 4, 1), total=5)
    assert counts.key_bias(CPU).exp().round().tolist() == [1, 1, 4, 1, 1]


def test_counts_that_are_all_one_are_none():
    assert layout_of([(2, 1)] * 2, last_counts=(1, 1)) == layout_of([(2, 1)] * 2)


# --- other masks ------------------------------------------------------------------------------------------------------

QUERIES, KEYS, BATCH, HEADS = 5, 7, 2, 3
FULL = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(0)) < 0.5
FULL[0, :, 2] = False


def distance(score, b, h, q_idx, kv_idx):
    return score * (1 + h) - 0.1 * (q_idx - kv_idx) + b


def looked_up(b, h, q_idx, kv_idx):
    return FULL[b, h, q_idx, kv_idx]


MASKS = {
    "none": (None, None),
    "dense": (FULL, FULL),
    "dense_per_head": (FULL[:1], FULL[:1]),
    "dense_per_batch": (FULL[:, :1], FULL[:, :1]),
    "dense_matrix": (FULL[0, 0], FULL[0, 0]),
    "dense_row": (FULL[0, 0, :1], FULL[0, 0, :1]),
    "blocks": (create_block_mask(looked_up, BATCH, HEADS, QUERIES, KEYS, device="cpu"), FULL),
    "blocks_of_all": (
        create_block_mask(lambda b, h, q, k: FULL[0, 0, q, k], None, None, QUERIES, KEYS, device="cpu"),
        FULL[:1, :1],
    ),
}
every_mask = pytest.mark.parametrize(("mask", "dense"), MASKS.values(), ids=MASKS)


def query_key_value(dtype=torch.float32, requires_grad=False):
    shapes = [(BATCH, HEADS, n, 4) for n in (QUERIES, KEYS, KEYS)]
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


@every_mask
@pytest.mark.parametrize("score_mod", [None, distance], ids=["plain", "score_mod"])
@pytest.mark.parametrize("backend", [*HERE, "auto"])
def test_any_mask_and_score_function(backend, score_mod, mask, dense):
    q, k, v = query_key_value()
    if (isinstance(mask, torch.Tensor) and backend == "flex") or (score_mod is not None and backend == "sdpa"):
        with pytest.raises(ValueError, match="cannot be used here"):
            attend(q, k, v, mask, scale=SCALE, score_mod=score_mod, backend=backend)
        return
    expected = reference_attention(q, k, v, dense, scale=SCALE, score_mod=score_mod)
    out = attend(q, k, v, mask, scale=SCALE, score_mod=score_mod, backend=backend)
    assert max_difference(out, expected) < 1e-5


@every_mask
@pytest.mark.parametrize("score_mod", [None, distance], ids=["plain", "score_mod"])
def test_gradients_under_any_mask_and_score_function(score_mod, mask, dense):
    inputs = query_key_value(torch.float64, requires_grad=True)
    expected = reference_attention(*inputs, dense, scale=SCALE, score_mod=score_mod)
    out = attend(*inputs, mask, scale=SCALE, score_mod=score_mod)
    for mine, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert max_difference(mine, theirs) < 1e-12


@pytest.mark.parametrize("backend", ["flex", "reference", "auto"])
@settings(max_examples=15)
@given(arguments=layout_arguments())
def test_a_layout_and_a_score_function(backend, arguments):
    """Of a layout with equal tokens the function comes first, then their count."""

    layout = SequenceLayout(**arguments)

    def scores(score, b, h, q_idx, kv_idx):
        return score * (1 + 0.5 * h) - 0.1 * (q_idx - kv_idx)

    q, k, v = random_qkv(layout)
    bias = layout.key_bias(CPU)

    def both(score, b, h, q_idx, kv_idx):
        changed = scores(score, b, h, q_idx, kv_idx)
        return changed if bias is None else changed + bias[kv_idx]

    expected = reference_attention(q, k, v, layout.dense_mask(), scale=SCALE, score_mod=both)
    out = attend(q, k, v, layout, scale=SCALE, score_mod=scores, backend=backend)
    assert max_difference(out, expected) < 1e-5


# --- grouped heads and masks that are added ---------------------------------------------------------------------------

GROUPS = {"grouped": (6, 2), "of_one": (4, 1), "not_grouped": (2, 2)}
grouped_heads = pytest.mark.parametrize(("heads", "key_heads"), GROUPS.values(), ids=GROUPS)


def grouped_query_key_value(length, heads, key_heads, **options):
    return [torch.randn(1, n, length, 4, **options) for n in (heads, key_heads, key_heads)]


@grouped_heads
@pytest.mark.parametrize("scored", [False, True], ids=["plain", "score_mod"])
@pytest.mark.parametrize("mask", [None, "dense", "blocks", "layout", "added"])
@pytest.mark.parametrize("backend", HERE)
def test_neighbouring_heads_may_share_keys(backend, mask, scored, heads, key_heads):
    layout = layout_of([(3, 2), (4, 1), (3, 2), (1, 1)])
    dense = layout.dense_mask()
    masks = {
        None: None,
        "dense": dense,
        "blocks": layout.block_mask(CPU),
        "layout": layout,
        "added": torch.zeros(dense.shape).masked_fill(~dense, float("-inf")),
    }
    if (mask in ("dense", "added") and backend == "flex") or (scored and backend == "sdpa"):
        return
    scores = distance if scored else None
    q, k, v = grouped_query_key_value(layout.row_length, heads, key_heads)
    out = attend(q, k, v, masks[mask], scale=SCALE, score_mod=scores, backend=backend)
    for head in range(heads):
        shared = head // (heads // key_heads)
        # The score function is told the head.
        of_head = (
            None if scores is None else lambda s, b, h, q_idx, kv_idx, head=head: distance(s, b, head, q_idx, kv_idx)
        )
        one = (x[:, i : i + 1] for x, i in ((q, head), (k, shared), (v, shared)))
        expected = reference_attention(*one, None if mask is None else dense, scale=SCALE, score_mod=of_head)
        assert max_difference(out[:, head : head + 1], expected) < 1e-5


@grouped_heads
def test_gradients_of_shared_keys_are_summed(heads, key_heads):
    for layout in (layout_of([(3, 2)] * 3), layout_of([(3, 2), (4, 1), (3, 2), (1, 1)]), layout_of([(0, 0), (0, 3)])):
        inputs = grouped_query_key_value(layout.row_length, heads, key_heads, dtype=torch.float64, requires_grad=True)
        expected = reference_attention(*inputs, layout.dense_mask(), scale=SCALE)
        out = attend(*inputs, layout, scale=SCALE, backend="sdpa")
        assert max_difference(out, expected) < 1e-12
        for mine, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
            assert max_difference(mine, theirs) < 1e-12


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_mask_of_floats_is_added_to_the_scores(backend):
    q, k, v = query_key_value()
    added = torch.randn(BATCH, 1, QUERIES, KEYS).masked_fill(torch.rand(BATCH, 1, QUERIES, KEYS) < 0.4, float("-inf"))
    added[:, :, 0] = float("-inf")
    weights = (q @ k.mT * SCALE + added).softmax(-1)
    out = attend(q, k, v, added, scale=SCALE, backend=backend)
    assert max_difference(out[:, :, 1:], (weights @ v)[:, :, 1:]) < 1e-5
    assert (out[:, :, 0] == 0).all()


@pytest.mark.parametrize(("key_heads", "value_heads"), [(4, 4), (3, 2)])
def test_heads_that_do_not_fit_are_an_error(key_heads, value_heads):
    q, k, v = (torch.randn(1, n, 5, 4) for n in (6, key_heads, value_heads))
    with pytest.raises(ValueError, match=f"6, {key_heads} and {value_heads} heads"):
        attend(q, k, v, None, scale=SCALE)


# --- choices ----------------------------------------------------------------------------------------------------------

UNIFORM, RAGGED = layout_of([(4, 2)] * 3), layout_of([(4, 2), (4, 1), (3, 2)])
DENSE, BLOCKS = UNIFORM.dense_mask(), UNIFORM.block_mask(CPU)


def request(mask, *, device=CPU, dtype=torch.float32, needs_grad=False, score_mod=None):
    length = mask.row_length if isinstance(mask, SequenceLayout) else 18
    return AttentionRequest(mask, length, length, device, dtype, needs_grad, score_mod)


IMPOSSIBLE = {
    "flex with a dense mask": (request(DENSE), "flex", "no dense mask", "auto, sdpa, reference"),
    "flex backwards": (request(UNIFORM, needs_grad=True), "flex", "no backward on the CPU", "auto, sdpa, reference"),
    "varlen on a CPU": (request(UNIFORM), "varlen", "CUDA only", "auto, flex, sdpa, reference"),
    "varlen in fp32": (request(RAGGED, device=CUDA), "varlen", "torch.float32", "auto, flex, sdpa, reference"),
    "varlen with blocks": (
        request(BLOCKS, device=CUDA, dtype=torch.bfloat16),
        "varlen",
        "layout of a packed row",
        "auto, flex, sdpa, reference",
    ),
    "varlen with scores": (
        request(RAGGED, device=CUDA, dtype=torch.bfloat16, score_mod=distance),
        "varlen",
        "no score function",
        "auto, flex, reference",
    ),
    "varlen with counts": (
        request(layout_of([(4, 2)] * 3, last_counts=(2, 3, 4)), device=CUDA, dtype=torch.bfloat16),
        "varlen",
        "cannot count a key",
        "auto, flex, sdpa, reference",
    ),
    "sdpa with scores": (request(UNIFORM, score_mod=distance), "sdpa", "no score function", "auto, flex, reference"),
    "sdpa with scores backwards": (
        request(UNIFORM, score_mod=distance, needs_grad=True),
        "sdpa",
        "no score function",
        "auto, reference",
    ),
}


@pytest.mark.parametrize(("asked", "backend", "reason", "working"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_choice_says_why_and_what_works(asked, backend, reason, working):
    with pytest.raises(ValueError, match=reason) as error:
        plan_attention(asked, backend)
    assert f"attention backend {backend!r} cannot be used here: " in str(error.value)
    assert str(error.value).endswith(f"these can: {working}")


def test_an_unknown_backend_names_the_known_ones():
    q, k, v = random_qkv(UNIFORM)
    with pytest.raises(ValueError, match="'flash' is unknown; valid: auto, flex, varlen, sdpa, reference"):
        engine._checked(request(UNIFORM), "flash")
    # Through the typed entrance the annotation may be checked before.
    with pytest.raises(Exception, match="flash"):
        attend(q, k, v, UNIFORM, scale=SCALE, backend="flash")


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "flex"])
def test_a_layout_of_another_length_is_an_error(backend):
    q, k, v = random_qkv(UNIFORM)
    with pytest.raises(ValueError, match="the mask describes 18 tokens, the sequence has 17"):
        attend(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], UNIFORM, scale=SCALE, backend=backend)
    with pytest.raises(ValueError, match="the mask describes 18 tokens"):
        attend(q, k[:, :, 1:], v[:, :, 1:], UNIFORM, scale=SCALE, backend=backend)


COUNTED = layout_of([(4, 2)] * 3, last_counts=(2, 3, 4))
COUNTED_RAGGED = layout_of([(4, 2), (4, 1), (3, 2)], last_counts=(2, 3, 4))
HIDDEN = layout_of([(4, 2)] * 3, keep_last=(0, 1, 2))
ORDERED = layout_of([(4, 2)] * 3, mode="causal_last")
BF16 = torch.bfloat16
CHOICES = [
    (request(None), "sdpa"),
    (request(DENSE), "sdpa"),
    (request(UNIFORM), "sdpa"),
    (request(RAGGED), "sdpa"),
    (request(RAGGED, needs_grad=True), "sdpa"),
    (request(ORDERED), "sdpa"),
    (request(COUNTED_RAGGED), "sdpa"),
    (request(BLOCKS), "flex"),
    (request(BLOCKS, needs_grad=True), "sdpa"),
    (request(UNIFORM, score_mod=distance), "flex"),
    (request(UNIFORM, score_mod=distance, needs_grad=True), "reference"),
    (request(DENSE, score_mod=distance), "reference"),
    (request(None, device=CUDA), "sdpa"),
    (request(DENSE, device=CUDA), "sdpa"),
    (request(UNIFORM, device=CUDA), "sdpa"),
    (request(UNIFORM, device=CUDA, dtype=BF16, needs_grad=True), "sdpa"),
    (request(HIDDEN, device=CUDA), "sdpa"),
    (request(COUNTED, device=CUDA), "sdpa"),
    (request(RAGGED, device=CUDA), "flex"),
    (request(RAGGED, device=CUDA, needs_grad=True), "flex"),
    (request(RAGGED, device=CUDA, dtype=BF16), "varlen"),
    (request(RAGGED, device=CUDA, dtype=torch.float16, needs_grad=True), "varlen"),
    (request(ORDERED, device=CUDA), "flex"),
    (request(ORDERED, device=CUDA, dtype=BF16), "varlen"),
    (request(COUNTED_RAGGED, device=CUDA, dtype=BF16), "flex"),
    (request(BLOCKS, device=CUDA, needs_grad=True), "flex"),
    (request(RAGGED, device=CUDA, dtype=BF16, needs_grad=True, score_mod=distance), "flex"),
    (request(DENSE, device=CUDA, score_mod=distance), "reference"),
]


@pytest.mark.parametrize(("asked", "chosen"), CHOICES)
def test_what_auto_chooses(asked, chosen):
    """Written out, so that a change of it is seen; CUDA requests need no tensors."""
    assert engine._choose(asked) == chosen
    assert engine.why_not(asked, chosen) is None


@settings(max_examples=25)
@given(
    layout_arguments(),
    st.sampled_from([CPU, CUDA]),
    st.sampled_from([torch.float32, BF16]),
    st.booleans(),
    st.booleans(),
)
def test_auto_always_finds_one(arguments, device, dtype, needs_grad, scored):
    layout = SequenceLayout(**arguments)
    asked = request(layout, device=device, dtype=dtype, needs_grad=needs_grad, score_mod=distance if scored else None)
    assert engine.why_not(asked, engine._choose(asked)) is None


def test_an_explicit_choice_is_what_runs():
    q, k, v = random_qkv(UNIFORM)
    for backend in HERE:
        with record_backends() as names:
            attend(q, k, v, UNIFORM, scale=SCALE, backend=backend)
        assert names == [backend]


# --- records and plans ------------------------------------------------------------------------------------------------


def test_records_may_be_nested_and_survive_errors():
    q, k, v = random_qkv(UNIFORM)
    with record_backends() as outer:
        attend(q, k, v, UNIFORM, scale=SCALE)
        with record_backends() as inner:
            attend(q, k, v, UNIFORM, scale=SCALE, backend="reference")
        with pytest.raises(RuntimeError, match="on purpose"), record_backends():
            raise RuntimeError("on purpose")
        with pytest.raises(ValueError, match="cannot be used"):
            attend(q, k, v, UNIFORM, scale=SCALE, backend="varlen")
        attend(q, k, v, UNIFORM, scale=SCALE, backend="flex")
    attend(q, k, v, UNIFORM, scale=SCALE)
    assert (outer, inner) == (["sdpa", "flex"], ["reference"])


@pytest.mark.parametrize("backend", ["auto", *HERE])
def test_a_plan_of_a_layout_is_made_once(backend, monkeypatch):
    built, make = [], engine._plan
    monkeypatch.setattr(engine, "_plan", lambda asked, chosen: built.append(chosen) or make(asked, chosen))
    layout = layout_of([(4, 2), (4, 1), (3, 2)])
    plans = [plan_attention(request(layout), backend) for _ in range(3)]
    assert plans[0] is plans[1] is plans[2]
    assert len(built) == 1
    assert plan_attention(request(layout, dtype=torch.float64), backend) is not plans[0]
    assert plan_attention(request(layout_of(layout.lengths)), backend) is not plans[0]
    assert len(built) == 3


def test_a_plan_with_a_score_function_is_not_shared():
    def other(score, b, h, q_idx, kv_idx):
        return score + kv_idx

    layout = layout_of([(4, 2)] * 2)
    q, k, v = random_qkv(layout)
    results = [attend(q, k, v, layout, scale=SCALE, score_mod=mod) for mod in (distance, other, None)]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert max_difference(results[i], results[j]) > 1e-3


def test_a_plan_is_used_instead_of_its_mask():
    q, k, v = random_qkv(RAGGED)
    plan = plan_attention(request(RAGGED), "reference")
    with record_backends() as names:
        out = attend(q, k, v, plan, scale=SCALE)
    assert names == []
    assert max_difference(out, attend(q, k, v, RAGGED, scale=SCALE)) < 1e-6
    with pytest.raises(ValueError, match="score_mod is part of a plan"):
        attend(q, k, v, plan, scale=SCALE, score_mod=distance)
