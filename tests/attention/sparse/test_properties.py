"""What holds for every mask and every masker."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from flextok.attention.sparse import Mask, flex_masked_attention, gathered_attention, masked_attention
from tests.attention.sparse.problems import problems, specs
from tests.attention.sparse.vectors import attention_of

NAMES = list(specs(1))
SELECTING = ["sink", "trailing", "window", "centered", "causal", "hash", "random", "magic_pig"]
SAMPLERS = ["random", "magic_pig", "adaptive"]
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2}


def tensors_of(problem):
    return [x for x in problem[:4] if x is not None]


@given(problem=problems(), mode=st.sampled_from(["dense", "sparse"]))
def test_merging_adds_up_to_one_and_changes_neither(problem, mode):
    a, b = problem.random_mask(), problem.random_mask()
    before = a.get_dense_mask(), b.get_dense_mask()
    merged = a.merge_mask(b, mode=mode).get_dense_mask()
    assert_close(merged, (before[0] + before[1]).clamp(max=1), rtol=0, atol=0)
    assert (merged >= torch.maximum(*before)).all()
    assert torch.equal(a.get_dense_mask(), before[0])
    assert torch.equal(b.get_dense_mask(), before[1])
    full, empty = (make(a.shape, torch.float32) for make in (Mask.create_full_mask, Mask.create_empty_mask))
    assert a.merge_mask(full, mode=mode).is_full_mask()
    assert full.merge_mask(a, mode=mode).is_full_mask()
    assert torch.equal(a.merge_mask(empty, mode=mode).get_dense_mask(), before[0])
    assert torch.equal(empty.merge_mask(a, mode=mode).get_dense_mask(), before[0])


@given(problem=problems())
def test_dense_and_compressed_agree(problem):
    dense = problem.random_mask()
    rows = Mask.create_mask_from_indices(dense.shape, *dense.get_index_mask(), torch.float32)
    assert torch.equal(rows.get_dense_mask(), dense.get_dense_mask())
    assert all(map(torch.equal, rows.get_index_mask(), dense.get_index_mask()))
    assert rows.get_density() == dense.get_density()
    assert rows.is_full_mask() == dense.is_full_mask()
    assert rows.is_empty_mask() == dense.is_empty_mask()
    x = torch.randn(dense.shape)
    for apply in (Mask.apply_mask, Mask.apply_inv_mask):
        results = [apply(mask, x, mode) for mask in (dense, rows) for mode in ("dense", "sparse")]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems())
def test_a_masker_lowers_nothing_and_changes_no_input(name, problem):
    masker = attention_of([specs(problem.q.shape[1])[name]]).maskers[0]
    previous = problem.random_mask()
    before, inputs = previous.get_dense_mask(), [x.clone() for x in tensors_of(problem)]
    call = problem.arguments(previous_mask=previous, layer_idx=0, generator=problem.generator, unknown="ignored")
    values = masker.add_mask(**call).get_dense_mask()
    assert (values >= before).all()
    assert (values <= 1).all()
    assert torch.equal(previous.get_dense_mask(), before)
    assert all(map(torch.equal, tensors_of(problem), inputs))
    if name not in SAMPLERS:
        assert ((values == before) | (values == 1)).all()


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems())
def test_a_full_mask_is_returned_at_once(name, problem):
    full = Mask.create_full_mask(problem.shape, torch.float32)
    masker = attention_of([specs(problem.q.shape[1])[name]]).maskers[0]
    call = problem.arguments(previous_mask=full, sparse_meta_data=None)
    assert masker.add_mask(**call) is full


@pytest.mark.parametrize("name", ["top_k", "top_p", "hash", "adaptive"])
@given(problem=problems(kinds=("bool", "float")))
def test_rules_that_look_choose_allowed_keys_only(name, problem):
    masker = attention_of([specs(problem.q.shape[1])[name]]).maskers[0]
    call = problem.arguments(layer_idx=0, generator=problem.generator)
    previous = problem.random_mask()
    mask = masker.add_mask(previous_mask=previous, **call)
    if not mask.is_full_mask():
        allowed = problem.attention_mask[..., : problem.shape[-1]]
        allowed = allowed if allowed.dtype == torch.bool else allowed > -1e38
        new = mask.get_dense_mask() > previous.get_dense_mask()
        assert not (new & ~allowed).any()


@given(problem=problems())
def test_gathered_attention_agrees_with_masked_attention(problem):
    q, k, v, attention_mask, _ = problem
    mask = problem.random_mask()
    expected, weights = masked_attention(q, k, v, mask, 0.4, attention_mask)
    tolerance = TOLERANCE[q.dtype]
    assert expected.dtype == q.dtype
    assert weights.dtype == torch.float32
    assert not expected.isnan().any()
    seen = weights.sum(-1)
    assert ((seen - 1).abs().minimum(seen.abs()) < 1e-5).all()
    gathered = gathered_attention(q, k, v, mask, 0.4, attention_mask)
    assert_close(gathered, expected, rtol=0, atol=tolerance)
    # A longer cache of which these keys are a part: the rows of one head lie no longer behind those of another.
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 3), value=torch.nan)[:, :, : problem.shape[-1]] for x in (k, v))
    assert torch.equal(gathered_attention(q, k, v, mask, 0.4, attention_mask), gathered)


@settings(max_examples=10)
@given(problem=problems())
def test_flex_attention_agrees_with_masked_attention(problem):
    q, k, v, attention_mask, _ = problem
    # Each shape is traced anew, which has a limit.
    torch.compiler.reset()
    mask = problem.random_mask()
    expected, _ = masked_attention(q, k, v, mask, 0.4, attention_mask)
    flex = flex_masked_attention(q, k, v, mask, 0.4, attention_mask, block_size=16)
    assert_close(flex, expected, rtol=0, atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize(("num_queries", "num_keys"), [(37, 201), (1, 201)])
def test_conversions_agree_over_several_tiles(num_queries, num_keys):
    q, k, v = torch.randn(2, 4, num_queries, 16), torch.randn(2, 2, num_keys, 16), torch.randn(2, 2, num_keys, 16)
    values = torch.rand(2, 4, num_queries, num_keys) * (torch.rand(2, 4, num_queries, num_keys) < 0.3)
    values[:, :, 0] = (values[:, :, 0] > 0).float()
    values[0, :, -1] = 0
    bias = torch.randn(2, 1, num_queries, num_keys + 4)
    mask = Mask.create_mask_from_dense_mask(values.shape, values, torch.float32)
    for attention_mask in (None, bias, bias > -1):
        expected, _ = masked_attention(q, k, v, mask, 0.25, attention_mask)
        assert_close(gathered_attention(q, k, v, mask, 0.25, attention_mask), expected, rtol=0, atol=1e-5)
        for block_size in (64, 128):
            flex = flex_masked_attention(q, k, v, mask, 0.25, attention_mask, block_size)
            assert_close(flex, expected, rtol=0, atol=1e-5)


@given(problem=problems(kinds=("none", "bool")))
def test_no_maskers_are_dense_attention(problem):
    q, k, v, attention_mask, _ = problem
    call = problem.arguments()
    output, _ = attention_of([]).custom_attention(None, **call)
    mask = None if attention_mask is None else attention_mask[..., : problem.shape[-1]]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), mask, scale=0.4)
    assert_close(output.float(), dense.transpose(1, 2), rtol=0, atol=TOLERANCE[q.dtype])
    gathered = attention_of([]).gathered_attention(**{n: x for n, x in call.items() if n != "dropout"})
    assert torch.equal(gathered, output)


@given(problem=problems(), names=st.lists(st.sampled_from(SELECTING), min_size=1, max_size=4))
def test_selecting_columns_chooses_what_the_mask_holds(problem, names):
    # One sampler at most, and it comes last.
    names = [n for n in names if n not in SAMPLERS] + [n for n in names if n in SAMPLERS][:1]
    attention = attention_of([specs(problem.q.shape[1])[name] for name in names])
    state = problem.generator.get_state()
    call = problem.arguments(layer_idx=0, generator=problem.generator)
    mask = attention.build_mask(**call)
    problem.generator.set_state(state)
    call = {name: x for name, x in call.items() if name not in ("values", "dropout", "scaling")} | {
        "sparse_meta_data": {}
    }
    columns, probabilities = attention.select(**call)
    found = torch.zeros(*problem.shape[:-1], problem.shape[-1] + 1)
    place = torch.where(probabilities > 0, columns, problem.shape[-1])
    assert (place.sort(-1).values.diff() > 0)[place.sort(-1).values[..., 1:] < problem.shape[-1]].all()
    found.scatter_(-1, place, probabilities)
    assert_close(found[..., :-1], mask.get_dense_mask(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SELECTING)
@given(problem=problems())
def test_decoding_by_gathered_keys_equals_the_research_path(name, problem):
    chosen = [specs(problem.q.shape[1])[n] for n in ("sink", name)]
    attention = attention_of(chosen)
    state = problem.generator.get_state()
    call = problem.arguments(layer_idx=0, generator=problem.generator)
    expected, _ = attention.custom_attention(None, **call)
    problem.generator.set_state(state)
    output = attention.gathered_attention(**{n: x for n, x in call.items() if n != "dropout"})
    assert_close(output, expected, rtol=0, atol=TOLERANCE[problem.q.dtype])


@pytest.mark.parametrize("name", ["top_k", "top_p", "adaptive"])
def test_rules_that_need_all_logits_say_that_they_cannot_select(name):
    attention = attention_of([specs(2)[name]])
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match="needs all scores"):
        attention.select(q, k, None, {}, layer_idx=0)
