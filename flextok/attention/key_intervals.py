"""Geometric maskers on a packed row: per query a few intervals of keys, so that nothing of tokens x tokens is built.

What a layout allows a query is one interval too: with visible tokens `[start, end)` and the border of
`flextok.attention.block_masks` it is `[start, max(border, q + 1))`, or `[start, end)` in mode full. The mask of sink,
local and causal maskers under a layout is therefore a union of intervals, one per masker.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flextok.attention.layout import SequenceLayout
from flextok.attention.masks import MaskMod, or_masks
from flextok.attention.sparse import MaskerConfig
from flextok.attention.sparse.block_mask import _block_mask, key_ranges

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class KeyIntervals:
    """Keys `start <= k < stop` of each query, `[intervals, tokens]`; a query sees the union of its intervals."""

    start: Integers
    stop: Integers

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key; keys in several intervals count once."""
        order = self.start.argsort(axis=0, kind="stable")
        start, stop = (np.take_along_axis(x, order, axis=0) for x in (self.start, self.stop))
        reached = np.maximum.accumulate(np.pad(stop, ((1, 0), (0, 0))), axis=0)[:-1]
        return int(np.maximum(0, stop - np.maximum(start, reached)).sum())

    def mask_mod(self, device: torch.device) -> MaskMod:
        """The mask as a FlexAttention `mask_mod`, from two tables of the length of the row."""
        tables = (torch.from_numpy(table).to(device, torch.int32) for table in (self.start, self.stop))
        return or_masks(*(_interval_mask(start, stop) for start, stop in zip(*tables, strict=True)))

    def block_mask(self, device: torch.device, *, block_size: int = 128) -> BlockMask:
        """The mask as a `BlockMask` `[1, 1, tokens, tokens]`, from arithmetic on the ends of intervals.

        Tiles that only several intervals together fill count as partial: their pairs are looked at.
        """
        length = self.start.shape[1]
        num_blocks = -(-length // block_size)
        block = np.arange(length) // block_size
        some, every = np.zeros((2, num_blocks, num_blocks), dtype=bool)
        for start, stop in zip(self.start, self.stop, strict=True):
            some |= _covered(block, start // block_size, -(-stop // block_size), stop > start, num_blocks) > 0
            full = -(-start // block_size), stop // block_size
            every |= _covered(block, *full, full[1] > full[0], num_blocks) == block_size
        partial, whole = (torch.from_numpy(tiles)[None, None].to(device) for tiles in (some & ~every, every))
        return _block_mask(partial, whole, self.mask_mod(device), (length, length), block_size)


def key_intervals(layout: SequenceLayout, maskers: Sequence[MaskerConfig]) -> KeyIntervals:
    """What geometric maskers, applied to each sample by itself, leave of a layout; without maskers, all of it.

    A sample's queries and keys are its visible tokens: shares are of those. Others see nothing.

    Raises:
        ValueError: a masker chooses by more than the place of a key.
    """
    ranges = {length: key_ranges(maskers, length, length) for length in set(layout.visible_lengths) if length}
    # A share of few keys may be none, so samples differ in how many ranges they have; one at least makes a mask.
    num_ranges = max([1, *map(len, ranges.values())])
    start, stop = np.zeros((2, num_ranges, layout.row_length), dtype=np.int64)
    begin = 0
    for row, length, visible in zip(layout.lengths, layout.sample_lengths, layout.visible_lengths, strict=True):
        place = np.arange(visible)
        seen = visible_up_to(layout, place, before_last=length - row[-1], visible=visible)
        for index, found in enumerate(ranges.get(visible, ())):
            low, high = found.bounds(place)
            low, high = np.maximum(low, 0), np.minimum(high, seen)
            inside = slice(begin, begin + visible)
            start[index, inside] = begin + low
            stop[index, inside] = begin + np.maximum(low, high)
        begin += length
    return KeyIntervals(start, stop)


def visible_up_to(layout: SequenceLayout, place: Integers, *, before_last: int, visible: int) -> Integers:
    """Per query of a sample, by its place, the first key that the layout's mode hides from it."""
    if layout.mode == "full":
        return np.full_like(place, visible)
    border = min(before_last, visible) if layout.mode == "causal_last" else 0
    return np.maximum(border, place + 1)


def _covered(rows: Integers, first: Integers, behind: Integers, valid: NDArray[np.bool_], size: int) -> Integers:
    """`[size, size]`: how many of the intervals `[first, behind)` of each of the `rows` hold each column."""
    change = np.zeros((size, size + 1), dtype=np.int64)
    np.add.at(change, (rows[valid], first[valid]), 1)
    np.add.at(change, (rows[valid], behind[valid]), -1)
    return change.cumsum(axis=1)[:, :-1]


def _interval_mask(start: Tensor, stop: Tensor) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: (kv_idx >= start[q_idx]) & (kv_idx < stop[q_idx])
