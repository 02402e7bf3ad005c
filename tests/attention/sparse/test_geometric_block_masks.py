"""Geometric maskers as functions of positions and as block masks, without anything of the size queries x keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from flextok.attention.engine import attend
from flextok.attention.masks import materialize
from flextok.attention.sparse import (
    build_config,
    geometric_block_mask,
    masked_attention,
    to_block_mask,
    to_mask_mod,
    to_score_mod,
    windowed_attention,
)
from flextok.attention.sparse.block_mask import tiles_of_ranges
from tests.attention.sparse.problems import problems
from tests.attention.sparse.vectors import attention_of, mask_of

sizes = st.one_of(st.integers(1, 60), st.floats(0.001, 1.2))
geometric_specs = st.lists(
    st.one_of(
        st.fixed_dictionaries({"type": st.just("SinkMasker"), "sink_size": sizes}),
        st.just({"type": "CausalMasker"}),
        st.fixed_dictionaries(
            {
                "type": st.just("LocalMasker"),
                "window_size": sizes,
                "mode": st.sampled_from(["trailing", "centered"]),
                "dense_when_short": st.booleans(),
            }
        ),
    ),
    max_size=3,
)
lengths = st.integers(1, 70)


def dense_of(specs, num_queries, num_keys):
    q, k = torch.zeros(1, 1, num_queries, 4), torch.zeros(1, 1, num_keys, 4)
    return attention_of(specs).build_mask(q, k, k, None, 1.0, 0.0, {}).get_dense_mask()[0, 0] > 0


@settings(max_examples=100)
@given(specs=geometric_specs, num_queries=lengths, num_keys=lengths, block_size=st.sampled_from([1, 4, 16, 128]))
def test_function_and_block_mask_are_the_mask(specs, num_queries, num_keys, block_size):
    configs = build_config(specs).masker_configs
    expected = dense_of(specs, num_queries, num_keys)
    mask_mod = to_mask_mod(configs, num_queries, num_keys)
    assert torch.equal(materialize(mask_mod, 1, 1, num_queries, num_keys)[0, 0], expected)
    block_mask = geometric_block_mask(configs, num_queries, num_keys, block_size=block_size)
    evaluated = create_block_mask(mask_mod, 1, 1, num_queries, num_keys, device="cpu", BLOCK_SIZE=block_size)
    assert torch.equal(block_mask.to_dense(), evaluated.to_dense())
    assert block_mask.shape == evaluated.shape
    assert block_mask.kv_num_blocks.dtype == block_mask.kv_indices.dtype == torch.int32
    # Tiles that count as full are full; those that one range alone fills are found.
    configs_ranges = [attention_of([spec]).maskers[0].key_range(num_queries, num_keys) for spec in specs]
    _, every = tiles_of_ranges([r for r in configs_ranges if r is not None], num_queries, num_keys, block_size)
    padding = (0, -num_keys % block_size, 0, -num_queries % block_size)
    pairs = torch.nn.functional.pad(expected, padding)
    visible = pairs.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size)).float().mean((1, 3))
    assert (visible[every] == 1).all()
    if len(specs) == 1:
        assert torch.equal(every, visible == 1)


@given(problem=problems(dtypes=(torch.float32,)), specs=geometric_specs, chunk_size=st.sampled_from([1, 4, 128]))
def test_windowed_attention_is_masked_attention(problem, specs, chunk_size):
    q, k, v, attention_mask, _ = problem
    mask = attention_of(specs).build_mask(q, k, v, attention_mask, 0.4, 0.0, {})
    expected, _ = masked_attention(q, k, v, mask, 0.4, attention_mask)
    configs = build_config(specs).masker_configs
    output = windowed_attention(q, k, v, configs, 0.4, attention_mask, chunk_size)
    assert_close(output, expected, rtol=0, atol=3e-5)


def test_windowed_attention_has_the_gradients_of_masked_attention():
    specs = [{"type": "SinkMasker", "sink_size": 3}, {"type": "LocalMasker", "window_size": 5, "mode": "centered"}]
    tensors = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    mask = attention_of(specs).build_mask(*tensors, None, 0.4, 0.0, {})
    outputs = (
        masked_attention(*tensors, mask, 0.4)[0],
        windowed_attention(*tensors, build_config(specs).masker_configs, 0.4, chunk_size=16),
    )
    weights = torch.randn(outputs[0].shape)
    expected, actual = (torch.autograd.grad((output * weights).sum(), tensors) for output in outputs)
    assert_close(actual, expected, rtol=0, atol=3e-5)


class Largest(TorchFunctionMode):
    """Remembers the size of the largest tensor that is made."""

    entries = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.entries = max(self.entries, each.numel())
        return result


def test_nothing_of_the_size_queries_times_keys_is_made():
    specs = [{"type": "SinkMasker", "sink_size": 64}, {"type": "LocalMasker", "window_size": 128, "mode": "centered"}]
    with Largest() as largest:
        block_mask = geometric_block_mask(build_config(specs).masker_configs, 65536, 65536)
    assert largest.entries <= 512 * 513
    assert block_mask.sparsity() > 99


def test_a_block_mask_is_made_once_per_configuration():
    configs = [build_config([{"type": "SinkMasker", "sink_size": size}]).masker_configs for size in (4, 4, 5)]
    masks = [geometric_block_mask(config, 40, 40, block_size=8) for config in configs]
    assert masks[0] is masks[1]
    assert masks[0] is not masks[2]


def test_the_engine_of_the_project_takes_it():
    specs = [{"type": "SinkMasker", "sink_size": 5}, {"type": "LocalMasker", "window_size": 9, "mode": "centered"}]
    q, k, v = (torch.randn(2, 3, 70, 16) for _ in range(3))
    output = attend(
        q, k, v, geometric_block_mask(build_config(specs).masker_configs, 70, 70, block_size=32), scale=0.25
    )
    mask = attention_of(specs).build_mask(q, k, v, None, 0.25, 0.0, {})
    expected, _ = masked_attention(q, k, v, mask, 0.25)
    assert_close(output.transpose(1, 2), expected, rtol=0, atol=2e-5)


def test_rules_that_look_at_content_have_no_closed_form():
    configs = build_config([{"type": "SinkMasker", "sink_size": 4}, {"type": "OracleTopK", "heavy_size": 4}])
    with pytest.raises(ValueError, match=r"masker_configs\[1\]: OracleTopK chooses by content"):
        to_mask_mod(configs.masker_configs, 8, 8)


@given(problem=problems(kinds=("none",)), block_size=st.sampled_from([4, 16, 128]), exact=st.booleans())
def test_block_masks_of_any_mask(problem, block_size, exact):
    mask = problem.random_mask()
    active = mask.get_dense_mask() > 0
    block_mask = to_block_mask(mask, block_size, exact)
    seen = materialize(block_mask.mask_mod, *problem.shape)
    assert torch.equal(seen, active) if exact else (seen | ~active).all()
    evaluated = create_block_mask(
        lambda b, h, i, j: active[b, h, i, j], *problem.shape, device="cpu", BLOCK_SIZE=block_size
    )
    assert torch.equal(block_mask.to_dense().expand_as(evaluated.to_dense()), evaluated.to_dense())
    if not exact:
        assert int(block_mask.kv_num_blocks.sum()) == 0


def test_equal_heads_are_stored_once():
    values = torch.rand(1, 1, 20, 30).round().expand(2, 3, 20, 30)
    assert to_block_mask(mask_of(values), 8).shape == (1, 1, 20, 30)
    values = values.clone()
    values[:, 1] = 0
    assert to_block_mask(mask_of(values), 8).shape == (1, 3, 20, 30)


def test_score_functions_exist_only_for_fractions():
    assert to_score_mod(mask_of(torch.tensor([[[[0.0, 1.0, 1.0]]]]))) is None
    assert to_score_mod(mask_of(torch.ones(1, 1, 2, 2))) is None
    score_mod = to_score_mod(mask_of(torch.tensor([[[[0.0, 0.25, 1.0]]]])))
    zero = torch.tensor(0)
    scores = torch.stack([score_mod(torch.tensor(1.0), zero, zero, zero, torch.tensor(j)) for j in range(3)])
    assert_close(scores, 1 + torch.tensor([0.0, 4.0, 1.0]).clamp(min=1).log())


@pytest.mark.parametrize("arguments", [(torch.ones(3, 4), 8), (torch.ones(1, 1, 3, 4), 0)])
def test_masks_and_blocks_of_other_shapes_are_refused(arguments):
    values, block_size = arguments
    with pytest.raises(ValueError, match="block_size"):
        to_block_mask(mask_of(values), block_size)
    with pytest.raises(ValueError, match="block_size"):
        geometric_block_mask([], 0, 4)
