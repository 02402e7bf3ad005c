"""Block masks of segments without looking at tokens x tokens.

A row of segments is a few runs: neighbouring tokens of one segment, all valid or all padding, all before the place
where the segments are joined or all after it. Within a run every token is like every other but for the order, so the
mask function is asked once per pair of runs, and what two blocks of tokens are to each other follows from the runs in
them. Under the causal order only the blocks on the diagonal need more: they are always partial.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flextok.attention.masks.mask_mod import MaskMod
from flextok.attention.masks.segments import GapKeys, segment_fusion


def segment_block_mask(
    segment_ids: Tensor,
    fusion_start: int | Tensor,
    *,
    adjacency: Tensor | None = None,
    gap_keys: GapKeys = "visible",
    valid: Tensor | None = None,
    block_size: int = 128,
) -> BlockMask:
    """The `BlockMask` `[batch or 1, 1, length, length]` of `segment_fusion` with these arguments.

    It is the one that `create_block_mask` finds by evaluating the mask everywhere. Rows never see nothing: `gap_rows`
    is `self`.

    Raises:
        ValueError: for what `segment_fusion` refuses, and a `block_size` below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}; valid: 1 token or more")
    mask_mod = segment_fusion(segment_ids, fusion_start, adjacency=adjacency, gap_keys=gap_keys, valid=valid)
    length, device = segment_ids.shape[-1], segment_ids.device
    start = torch.as_tensor(fusion_start, device=device)
    is_joined = torch.arange(length, device=device) >= start[..., None]
    is_valid = torch.ones_like(segment_ids, dtype=torch.bool) if valid is None else valid
    rows = torch.broadcast_tensors(*map(torch.atleast_2d, (segment_ids, is_joined, is_valid)))
    facts = enumerate(map(torch.stack, zip(*rows, strict=True)))
    some, every = map(torch.stack, zip(*(_kinds(mask_mod, row, of, block_size) for row, of in facts), strict=True))
    keys, queries = ((*_ordered(part), *_ordered(full)) for part, full in _both_ways(some & ~every, every))
    return BlockMask((length, length), *keys, *queries, (block_size, block_size), mask_mod)


def _kinds(mask_mod: MaskMod, row: int, facts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which blocks of a row meet in some pair of tokens, and which in every pair; bool `[blocks, blocks]` each.

    `facts` are `[facts, length]`: neighbours that agree in all of them are one run.
    """
    length = facts.shape[1]
    num_blocks = -(-length // size)
    begins = torch.cat([facts.new_ones(1, dtype=torch.bool), (facts[:, 1:] != facts[:, :-1]).any(0)])
    first = begins.nonzero()[:, 0]
    last = torch.cat([first[1:], first.new_tensor([length])]) - 1
    zero = first.new_zeros(())
    # The last token of a run as the query and the first of a run as the key: for a run and itself, a later and an
    # earlier token, unless it has but one.
    sees = mask_mod(zero + row, zero, last[:, None], first[None, :])
    edges = torch.arange(num_blocks, device=facts.device)[:, None] * size
    has = ((first < edges + size) & (last >= edges)).float()
    some = (has @ sees.float() @ has.mT > 0).tril(-1)
    every = (has @ (~sees).float() @ has.mT == 0).tril(-1)
    if length % size:
        # The last block ends outside the row, where nobody sees anything.
        every[-1] = False
    own = torch.eye(num_blocks, dtype=torch.bool, device=facts.device)
    return some | own, every | own if size == 1 else every


def _both_ways(part: Tensor, full: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of keys by those of queries, then the reverse."""
    yield part, full
    yield part.mT, full.mT


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Count `[batch, 1, blocks]` and indices `[batch, 1, blocks, blocks]` of partners, ascending, 0 after the count."""
    count, rows = blocks.sum(-1), blocks.flatten(0, 1)
    row, partner = rows.nonzero(as_tuple=True)
    first = count.flatten().cumsum(0) - count.flatten()
    indices = rows.new_zeros(rows.shape, dtype=torch.int32)
    # Sorting would do as well, ten times slower.
    indices[row, torch.arange(len(row), device=row.device) - first[row]] = partner.to(torch.int32)
    return count.to(torch.int32)[:, None], indices.view_as(blocks)[:, None]
