"""Geometric maskers with torch's own attention: queries in tiles, each with the keys that some of its queries see.

What no query of a tile sees is not computed, and nothing is larger than a tile's queries times its keys.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flextok.attention.backends.samples import SampleGroup, put_back
from flextok.attention.backends.sdpa import _sdpa
from flextok.attention.plan import AttentionPlan
from flextok.attention.sparse import KeyRange

TILE = 128
"""Queries that share a call."""


class _Tile(NamedTuple):
    queries: slice
    keys: tuple[slice, ...]
    """The keys that its queries see, without gaps inside of a slice."""
    mask: Tensor | None
    """`[queries, keys]`, added to the scores."""
    sees_nothing: Tensor | None
    """bool `[queries, 1]`; None if every query sees a key."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`[samples, heads, queries of the tile, width]` from q, k, v `[samples, heads, length, width]`."""
        q, k, v = q[:, :, self.queries], _joined(k, self.keys), _joined(v, self.keys)
        out = _sdpa(q, k, v, self.mask, scale)
        return out if self.sees_nothing is None else out.masked_fill(self.sees_nothing, 0.0)


def _joined(x: Tensor, parts: Sequence[slice]) -> Tensor:
    found = [x[:, :, part] for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


@dataclass(frozen=True)
class RangedPlan(AttentionPlan):
    """Tiles of each group of samples."""

    groups: tuple[SampleGroup, ...]
    tiles: tuple[tuple[_Tile, ...], ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        outputs = []
        for group, tiles in zip(self.groups, self.tiles, strict=True):
            parts = [tile.attend(group.of(q), group.of(k), group.of(v), scale) for tile in tiles]
            outputs.append((parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2))
        return put_back(self.groups, outputs, q)


def tiles_of(
    group: SampleGroup, ranges: Sequence[KeyRange], device: torch.device, dtype: torch.dtype
) -> tuple[_Tile, ...]:
    """The tiles of a group under the ranges of its maskers and its own mask."""
    bias = None if group.mask is None or group.mask.dtype == torch.bool else group.mask[0, 0, 0].cpu()
    seen = np.array(group.seen)
    tiles = []
    for begin in range(0, group.length, TILE):
        place = np.arange(begin, min(begin + TILE, group.length))
        bounds = [_bounds(found, place, seen[place]) for found in ranges]
        keys = _merged([(int(low[high > low].min()), int(high.max())) for low, high in bounds if (high > low).any()])
        column = np.concatenate([np.arange(low, high) for low, high in keys])
        is_read = np.zeros((len(place), len(column)), dtype=bool)
        for low, high in bounds:
            is_read |= (column >= low[:, None]) & (column < high[:, None])
        nothing = ~is_read.any(axis=1, keepdims=True)
        mask = None
        if not is_read.all() or bias is not None:
            # Queries without a key are given all of them: some kernels return NaN for none.
            hidden = torch.from_numpy(~(is_read | nothing))
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
            mask = mask if bias is None else mask + bias[torch.from_numpy(column)]
            mask = mask.to(device, non_blocking=True)
        tiles.append(
            _Tile(
                slice(begin, begin + len(place)),
                tuple(slice(low, high) for low, high in keys),
                mask,
                torch.from_numpy(nothing).to(device, non_blocking=True) if nothing.any() else None,
            )
        )
    return tuple(tiles)


def _bounds(found: KeyRange, place: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = (np.broadcast_to(bound, place.shape) for bound in found.bounds(place))
    return np.maximum(low, 0), np.minimum(high, seen)


def _merged(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint and ascending; one key where there would be none, for a call needs some."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged or [(0, 1)]
