"""Masks as FlexAttention's `BlockMask`: from values, and from the ranges of geometric maskers without any (Sq, Sk).

Scattered pairs touch every tile, and then a block mask saves nothing: it pays for windows, sinks and order.
Mask functions are written as lambdas: a check of argument types around them would not survive compilation.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flextok.attention.masks import MaskMod, or_masks
from flextok.attention.sparse.config import MaskerConfig
from flextok.attention.sparse.geometric import GeometricMasker, KeyRange
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import ResearchMasker


def to_mask_mod(masker_configs: Sequence[MaskerConfig], num_queries: int, num_keys: int) -> MaskMod:
    """The mask of geometric maskers (sink, local, causal) as a function of positions that holds no tensor.

    Raises:
        ValueError: a masker of the list chooses by more than the place of a key.
    """
    ranges = key_ranges(masker_configs, num_queries, num_keys)
    return _mask_mod(ranges, num_keys - num_queries)


def geometric_block_mask(
    masker_configs: Sequence[MaskerConfig],
    num_queries: int,
    num_keys: int,
    device: torch.device | str = "cpu",
    block_size: int = 128,
) -> BlockMask:
    """The `BlockMask` `[1, 1, Sq, Sk]` of geometric maskers, from arithmetic on tiles; made once per configuration.

    A tile that only several ranges together fill counts as partial: its pairs are then looked at, to the same result.

    Raises:
        ValueError: as `to_mask_mod`, or a block size or a length below 1.
    """
    if min(block_size, num_queries, num_keys) < 1:
        raise ValueError(f"block_size={block_size}, {num_queries} queries, {num_keys} keys; valid: 1 or more of each")
    ranges = key_ranges(masker_configs, num_queries, num_keys)
    return _cached_block_mask(ranges, num_queries, num_keys, torch.device(device), block_size)


def key_ranges(masker_configs: Sequence[MaskerConfig], num_queries: int, num_keys: int) -> tuple[KeyRange, ...]:
    """What each query sees, as ranges whose union it is; every key without maskers."""
    if not masker_configs:
        return (KeyRange(0, num_keys),)
    maskers = [ResearchMasker.create_masker_from_config(config) for config in masker_configs]
    ranges = []
    for place, masker in enumerate(maskers):
        if not isinstance(masker, GeometricMasker):
            raise ValueError(
                f"masker_configs[{place}]: {type(masker).__name__} chooses by content; valid here: sink, local, causal"
            )
        ranges.append(masker.key_range(num_queries, num_keys))
    return tuple(found for found in ranges if found is not None)


def to_block_mask(mask: Mask, block_size: int = 128, exact: bool = True) -> BlockMask:
    """The `BlockMask` `[B or 1, H or 1, Sq, Sk]` of a mask `(B, H, Sq, Sk)`; 1 where all entries or heads are equal.

    Args:
        exact: tiles in part active look at each pair; without it, all tiles with any active pair count as full.

    Raises:
        ValueError: the mask has other than four dimensions, or a block size below 1.
    """
    if len(mask.shape) != 4 or block_size < 1:
        raise ValueError(f"mask of shape {list(mask.shape)}, block_size={block_size}; valid: [B, H, Sq, Sk], 1 or more")
    return block_mask_of_pairs(mask.get_dense_mask() > 0, block_size, exact)


def block_mask_of_pairs(active: Tensor, block_size: int, exact: bool = True) -> BlockMask:
    """The `BlockMask` of active pairs, bool `(B, H, Sq, Sk)`."""
    for dim in (0, 1):
        first = active.narrow(dim, 0, 1)
        if torch.equal(active, first.expand_as(active)):
            active = first
    num_queries, num_keys = active.shape[2:]
    padding = (0, -num_keys % block_size, 0, -num_queries % block_size)
    tiles = torch.nn.functional.pad(active, padding).unflatten(3, (-1, block_size)).unflatten(2, (-1, block_size))
    some, every = tiles.any(5).any(3), tiles.all(5).all(3)
    if exact:
        return _block_mask(some & ~every, every, entry_of(active), (num_queries, num_keys), block_size)
    touched = entry_of(some)
    # Kernels do not ask for pairs of full tiles; implementations without tiles ask this.
    mask_mod: MaskMod = lambda b, h, q_idx, kv_idx: touched(b, h, q_idx // block_size, kv_idx // block_size)  # noqa: E731
    return _block_mask(torch.zeros_like(some), some, mask_mod, (num_queries, num_keys), block_size)


def entry_of(table: Tensor) -> MaskMod:
    """A function of `(b, h, i, j)` that reads `table` of four dimensions; those of size 1 serve every index."""
    b_step, h_step, i_step, j_step = (int(size > 1) for size in table.shape)
    return lambda b, h, i, j: table[b * b_step, h * h_step, i * i_step, j * j_step]


def _mask_mod(ranges: Sequence[KeyRange], offset: int) -> MaskMod:
    nothing: MaskMod = lambda b, h, q_idx, kv_idx: kv_idx + q_idx < 0  # noqa: E731
    return or_masks(*(_range_mask(found, offset) for found in ranges)) if ranges else nothing


def _range_mask(found: KeyRange, offset: int) -> MaskMod:
    # A bound that does not move still depends on the query, times 0, so that the result has both dimensions.
    start, stop = (found.start + offset * found.start_moves, found.stop + offset * found.stop_moves)
    start_step, stop_step = int(found.start_moves), int(found.stop_moves)
    return lambda b, h, q_idx, kv_idx: (kv_idx >= start + q_idx * start_step) & (kv_idx < stop + q_idx * stop_step)


# All layers of all passes over rows of one length share it; bounded, for lengths may be many.
@lru_cache(maxsize=64)
def _cached_block_mask(
    ranges: tuple[KeyRange, ...], num_queries: int, num_keys: int, device: torch.device, block_size: int
) -> BlockMask:
    some, every = tiles_of_ranges(ranges, num_queries, num_keys, block_size)
    mask_mod = _mask_mod(ranges, num_keys - num_queries)
    partial, full = ((tiles)[None, None].to(device) for tiles in (some & ~every, every))
    return _block_mask(partial, full, mask_mod, (num_queries, num_keys), block_size)


def tiles_of_ranges(
    ranges: Sequence[KeyRange], num_queries: int, num_keys: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Tiles `(query tiles, key tiles)` with an active pair, and those that one range fills; bool, on the CPU."""
    first = torch.arange(0, num_queries, block_size)[:, None]
    begin = torch.arange(0, num_keys, block_size)[None, :]
    last, end = (first + block_size).clamp(max=num_queries) - 1, (begin + block_size).clamp(max=num_keys)
    whole = (first + block_size <= num_queries) & (begin + block_size <= num_keys)
    some = torch.zeros(len(first), begin.shape[1], dtype=torch.bool)
    every = torch.zeros_like(some)
    offset = num_keys - num_queries
    for found in ranges:
        # Some first queries see a key before the end of a tile, some last ones see a key behind its begin.
        up_to = end - found.start - offset - 1 if found.start_moves else torch.where(found.start < end, last, -1)
        since = (
            begin - found.stop - offset + 1 if found.stop_moves else torch.where(found.stop > begin, first, last + 1)
        )
        some |= torch.maximum(first, since) <= torch.minimum(last, up_to)
        start, _ = found.bounds(last + offset)
        _, stop = found.bounds(first + offset)
        every |= whole & (torch.as_tensor(start) <= begin) & (torch.as_tensor(stop) >= end)
    return some, every


def _block_mask(
    partial: Tensor, full: Tensor, mask_mod: MaskMod, lengths: tuple[int, int], block_size: int
) -> BlockMask:
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=block_size, mask_mod=mask_mod, seq_lengths=lengths
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of tiles how many are True and their columns, ascending, 0 after the last; int32."""
    count = tiles.sum(-1, dtype=torch.int32)
    columns = tiles.int().argsort(stable=True, dim=-1, descending=True).int()
    slots = torch.arange(tiles.shape[-1], device=tiles.device)
    return count, columns.masked_fill_(slots >= count[..., None], 0)
