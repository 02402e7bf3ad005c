"""A compiler sees one graph per kind of mask: other values in the tensors a mask holds never start it again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from flextok.attention.masks import (
    alive_mask,
    and_masks,
    causal_mask,
    create_flex_attention_mask,
    isolation_adjacency,
    materialize,
    nested_dropout_mask,
    or_masks,
    packed_mask,
    position_window_mask,
    prefix_mask,
    same_sample_mask,
    segment_fusion,
    trailing_window_mask,
    visible_keys_mask,
)

LENGTH = 12


def numbers(seed, low, high, size=LENGTH):
    return torch.randint(low, high, (size,), generator=torch.Generator().manual_seed(seed))


def packed(mode):
    def make(seed):
        return packed_mask(numbers(seed, -1, 3), torch.arange(LENGTH), numbers(seed, 0, 2).bool(), mode=mode)

    return make


MASKS = {
    "nested_dropout": lambda seed: nested_dropout_mask(numbers(seed, 0, 9, 2), 4),
    "prefix": lambda seed: prefix_mask(numbers(seed, 0, 9, 2)),
    "same_sample": lambda seed: same_sample_mask(numbers(seed, -1, 3)),
    "alive": lambda seed: alive_mask(numbers(seed, 0, 2).bool()),
    "visible_keys": lambda seed: visible_keys_mask(numbers(seed, 0, 2).bool()),
    "packed_full": packed("full"),
    "packed_causal": packed("causal"),
    "packed_causal_last": packed("causal_last"),
    "position_window": lambda seed: position_window_mask(numbers(seed, 0, 9), 4),
    "isolation": lambda seed: create_flex_attention_mask([(0, 2 + seed), (3 + seed, 8)], 8),
    "segments": lambda seed: segment_fusion(numbers(seed, -1, 3), 7 + seed),
    "adjacent_segments": lambda seed: segment_fusion(
        numbers(seed, -1, 3),
        numbers(seed, 6, 9, 2),
        adjacency=isolation_adjacency(3, shared_prefix=seed % 2 == 0),
        gap_keys="hidden",
        valid=numbers(seed, 0, 2).bool(),
    ),
    "composition": lambda seed: or_masks(
        and_masks(causal_mask(), same_sample_mask(numbers(seed, -1, 3))), trailing_window_mask(2)
    ),
}
each_mask = pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


def indices(batch):
    index = torch.arange(LENGTH)
    return torch.arange(batch)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.long), index[:, None], index


@each_mask
def test_a_mask_is_one_graph_for_all_values(make):
    counter = CompileCounter()
    compiled = torch.compile(lambda mask, *where: mask(*where), backend=counter, fullgraph=True)
    for seed in range(3):
        mask = make(seed)
        expected = materialize(mask, 2, 1, LENGTH, LENGTH)
        assert torch.equal(compiled(mask, *indices(2)).expand_as(expected), expected)
    assert counter.frame_count == 1


@each_mask
def test_compiled_block_masks_are_one_graph_for_all_values(make):
    counter = CompileCounter()
    compiled = torch.compile(create_block_mask, backend=counter)
    for seed in range(3):
        mask = make(seed)
        arguments = (mask, 2, None, LENGTH, LENGTH)
        blocks = compiled(*arguments, device="cpu", BLOCK_SIZE=4)
        expected = create_block_mask(*arguments, device="cpu", BLOCK_SIZE=4)
        assert torch.equal(blocks.to_dense(), expected.to_dense())
    assert counter.frame_count == 1


def test_masks_may_be_made_inside_a_compiled_function():
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def dense(segment_ids, fusion_start, adjacency, keep_k):
        mask = or_masks(
            segment_fusion(segment_ids, fusion_start, adjacency=adjacency), nested_dropout_mask(keep_k, num_before=2)
        )
        return mask(*indices(2))

    for seed in range(3):
        arguments = numbers(seed, -1, 3), numbers(seed, 0, 9, 2), isolation_adjacency(3), numbers(seed, 0, 5, 2)
        mask = or_masks(
            segment_fusion(*arguments[:2], adjacency=arguments[2]), nested_dropout_mask(arguments[3], num_before=2)
        )
        assert torch.equal(dense(*arguments), materialize(mask, 2, 1, LENGTH, LENGTH))
    assert counter.frame_count == 1


def test_other_lengths_compile_once_more_and_then_no_more():
    """The first length is compiled in, the second makes it a variable."""
    counter = CompileCounter()
    compiled = torch.compile(lambda mask, *where: mask(*where), backend=counter, fullgraph=True)
    for length in range(5, 11):
        ids = torch.arange(length) // 4
        mask = and_masks(segment_fusion(ids, length - 1), same_sample_mask(ids * 0))
        zero, index = torch.zeros((), dtype=torch.long), torch.arange(length)
        where = zero, zero, index[:, None], index
        assert torch.equal(compiled(mask, *where), materialize(mask, 1, 1, length, length)[0, 0])
    assert counter.frame_count == 2


def test_segments_become_machine_code():
    """Lookups in captured tensors and nothing else: what a code generator can put into a pointwise kernel."""
    compiled = torch.compile(lambda mask, *where: mask(*where), fullgraph=True)
    mask = MASKS["adjacent_segments"](1)
    assert torch.equal(compiled(mask, *indices(2)), materialize(mask, 2, 1, LENGTH, LENGTH))
