"""Block masks without looking at tokens x tokens: FlexAttention's lists of blocks, written from a layout's integers.

The visible tokens of a sample are a run `[start, end)`; hidden tokens and padding are gaps between runs. One number per
run, its border, makes all mask modes one rule: query q sees key k of its run iff `k <= q or k < border`. The border is
the run's end in `full`, its start in `causal`, the start of the sample's last sub-sequence in `causal_last`. Then

- of the keys of a run, some query of `[a, b)` sees exactly `[start, max(border, b))` and every query of it exactly
  `[start, max(border, a + 1))`; likewise the queries that see some or all of given keys are an interval;
- of the runs in a block only the first reaches further left and only the last further right, so the blocks that a block
  meets are one interval, from the first run's lower end to the last run's upper end;
- only blocks inside one run have full partners, and these are one interval within the former.

A row of the block mask is therefore four integers, found by one search per block among the runs; the partial blocks
are those around the full ones. The query lists are the same four integers seen from the keys: nothing is transposed.
"""

from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flextok.attention.layout import SequenceLayout
from flextok.attention.masks.mask_mod import MaskMod

Integers = NDArray[np.int64]
Lists = tuple[Tensor, Tensor, Tensor, Tensor]
MaybeLists = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def packed_block_mask(
    layout: SequenceLayout, device: torch.device, *, block_size: int = 128, with_queries: bool = True
) -> BlockMask:
    """The `BlockMask` `[1, 1, row_length, row_length]` of `layout`, with the lists `create_block_mask` would find.

    Lists are int32: counts `[1, 1, blocks]`, indices `[1, 1, blocks, blocks]`, ascending, 0 after the count.

    Args:
        block_size: tokens per block, of queries as of keys.
        with_queries: also write the lists from keys to queries, which only a backward pass reads.

    Raises:
        ValueError: if `block_size` is not positive or the row is empty.
    """
    length = layout.row_length
    if block_size < 1 or length < 1:
        raise ValueError(f"a row of {length} tokens has no blocks of {block_size}")
    num_blocks = -(-length // block_size)
    blocks = _blocks(_visible_runs(layout, behind=num_blocks * block_size), num_blocks, block_size)
    keys = _ordered_lists(_keys_of_queries(blocks), device)
    queries: MaybeLists = _ordered_lists(_queries_of_keys(blocks), device) if with_queries else (None,) * 4
    return BlockMask((length, length), *keys, *queries, (block_size, block_size), layout.mask_mod(device))


def block_mask_of(
    mask_mod: MaskMod,
    q_len: int,
    kv_len: int,
    device: torch.device,
    *,
    batch: int | None = None,
    heads: int | None = None,
    block_size: int = 128,
) -> BlockMask:
    """The `BlockMask` `[batch or 1, heads or 1, q_len, kv_len]` of any mask function, by evaluating it everywhere."""
    # Compiled, values are counted per block as they are made and never stored. On a CPU that would cost 17 s of
    # compilation, for masks whose plain evaluation takes a fraction of a second.
    create = _compiled_create_block_mask() if device.type == "cuda" else create_block_mask
    return create(mask_mod, batch, heads, q_len, kv_len, device=device, BLOCK_SIZE=block_size)


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


class _Runs(NamedTuple):
    """Visible tokens `[start, end)` of samples, in tokens of the row; every query of a run sees its keys < border."""

    start: Integers
    end: Integers
    border: Integers


class _Blocks(NamedTuple):
    """Per block of tokens `[begin, end)` of the row: the first run in it and the last one."""

    begin: Integers
    end: Integers
    first: _Runs
    last: _Runs
    size: int


def _visible_runs(layout: SequenceLayout, *, behind: int) -> _Runs:
    """The runs of all samples that have visible tokens, and an empty run at token `behind` the row."""
    num_samples = len(layout.lengths)
    lengths = np.fromiter(layout.sample_lengths, np.int64, num_samples)
    last = np.fromiter(map(itemgetter(-1), layout.lengths), np.int64, num_samples)
    start = lengths.cumsum() - lengths
    end = start + np.fromiter(layout.visible_lengths, np.int64, num_samples)
    border = {"full": end, "causal": start, "causal_last": start + lengths - last}[layout.mode]
    runs = np.stack([start, end, border])[:, start < end]
    return _Runs(*np.pad(runs, ((0, 0), (0, 1)), constant_values=behind))


def _blocks(runs: _Runs, num_blocks: int, size: int) -> _Blocks:
    begin = np.arange(num_blocks) * size
    # Without any run in the block, the first one starts behind it: at the latest, it is the empty run behind the row.
    first = np.searchsorted(runs.end, begin, side="right")
    last = np.searchsorted(runs.start, begin + size, side="left") - 1
    return _Blocks(begin, begin + size, _Runs(*(x[first] for x in runs)), _Runs(*(x[last] for x in runs)), size)


def _keys_of_queries(blocks: _Blocks) -> Integers:
    _, end, first, last, _ = blocks
    some_query_sees = first.start, np.maximum(last.border, np.minimum(last.end, end))
    every_query_sees = first.start, np.maximum(first.border, blocks.begin + 1)
    return _partners(blocks, some_query_sees, every_query_sees)


def _queries_of_keys(blocks: _Blocks) -> Integers:
    begin, end, first, last, _ = blocks
    first_key, last_key = np.maximum(first.start, begin), end - 1
    see_some_key = np.where(first_key < first.border, first.start, first_key), last.end
    see_every_key = np.where(last_key < first.border, first.start, last_key), first.end
    return _partners(blocks, see_some_key, see_every_key)


def _partners(blocks: _Blocks, some: tuple[Integers, Integers], every: tuple[Integers, Integers]) -> Integers:
    """`[4, blocks]`: first block met, number of them met in part, first one met in full, number of these.

    Some token of the block meets the tokens `[low, high)` of `some`; each of its tokens, if they are of one run, meets
    those of `every`.
    """
    _, end, first, _, size = blocks
    occupied = first.start < end
    in_one_run = (first.start <= blocks.begin) & (end <= first.end)
    first_met, first_full = some[0] // size, -(-every[0] // size)
    num_met = np.where(occupied, -(-some[1] // size) - first_met, 0)
    num_full = np.where(in_one_run, every[1] // size - first_full, 0)
    return np.stack([first_met, num_met - num_full, first_full, num_full])


def _ordered_lists(partners: Integers, device: torch.device) -> Lists:
    """Count and indices of the partial blocks, then of the full ones; only the `partners` travel to the device."""
    _, most_partial, _, most_full = partners.max(axis=1).tolist()
    on_device = torch.from_numpy(partners.astype(np.int32)).to(device, non_blocking=True)
    first_met, num_partial, first_full, num_full = on_device[..., None].unbind()

    def write(width: int, count: Tensor, index_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        slots = torch.arange(width, dtype=torch.int32, device=device)
        # As wide as there are blocks: kernels and `to_dense` read the length of the row off the width.
        indices = torch.zeros(1, 1, len(count), len(count), dtype=torch.int32, device=device)
        indices[0, 0, :, :width] = torch.where(slots < count, index_of(slots), 0)
        return count.reshape(1, 1, -1).clone(), indices

    def around_full(slots: Tensor) -> Tensor:
        index = first_met + slots
        return index + num_full * (index >= first_full)

    return *write(most_partial, num_partial, around_full), *write(most_full, num_full, lambda slots: first_full + slots)
