"""Prefill under geometric maskers (sink, local, causal) without anything of queries x keys.

On CUDA a block mask and FlexAttention; elsewhere chunks of queries, each with the keys that one of them sees.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flextok.attention.block_masks import block_mask_of
from flextok.attention.engine import attend
from flextok.attention.masks import MaskMod, and_masks
from flextok.attention.sparse import KeyRange, MaskerConfig, to_mask_mod
from flextok.attention.sparse.block_mask import key_ranges

CHUNK = 128
"""Queries at once."""


def causal_prefill(q: Tensor, k: Tensor, v: Tensor, masker_configs: Sequence[MaskerConfig], scaling: float) -> Tensor:
    """Attention `[1, queries, heads, head_dim]` of the last tokens over the earlier ones that geometric maskers choose.

    Args:
        q: `[1, heads, queries, head_dim]`; k and v `[1, kv_heads, keys, head_dim]`.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if q.device.type == "cuda":
        offset = num_keys - num_queries
        in_order: MaskMod = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset  # noqa: E731
        mask_mod = and_masks(to_mask_mod(masker_configs, num_queries, num_keys), in_order)
        block_mask = block_mask_of(mask_mod, num_queries, num_keys, q.device)
        return attend(q, k, v, block_mask, scale=scaling).transpose(1, 2)
    outputs = []
    for first, columns, active in _chunks(masker_configs, num_queries, num_keys, q.device):
        keys, values = (x[:, :, columns] for x in (k, v))
        queries = q[:, :, first : first + len(active)]
        mask = active[None, None]
        outputs.append(
            scaled_dot_product_attention(
                queries, keys, values, mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def count_pairs(masker_configs: Sequence[MaskerConfig], num_queries: int, num_keys: int) -> int:
    """How many pairs of a query and a key `causal_prefill` computes in each head."""
    chunks = _chunks(masker_configs, num_queries, num_keys, torch.device("cpu"))
    return sum(int(active.sum()) for _, _, active in chunks)


def _chunks(
    masker_configs: Sequence[MaskerConfig], num_queries: int, num_keys: int, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The first query, the columns that the chunk needs, and which pairs are active, bool `[queries, columns]`."""
    ranges = key_ranges(masker_configs, num_queries, num_keys)
    offset = num_keys - num_queries
    for first in range(0, num_queries, CHUNK):
        position = torch.arange(first, min(first + CHUNK, num_queries), device=device)[:, None] + offset
        columns = torch.cat([torch.arange(*span, device=device) for span in _spans(ranges, position)])
        active = torch.zeros(len(position), len(columns), dtype=torch.bool, device=device)
        for found in ranges:
            start, stop = found.bounds(position)
            active |= (columns >= start) & (columns < stop)
        yield first, columns, active & (columns <= position)


def _spans(ranges: Sequence[KeyRange], position: Tensor) -> Iterator[tuple[int, int]]:
    """Disjoint runs of keys, in order, with whatever queries at these positions see of keys up to the last one."""
    first, last = int(position[0]), int(position[-1])
    bounds = sorted((max(found.bounds(first)[0], 0), min(found.bounds(last)[1], last + 1)) for found in ranges)
    reached = 0
    yield 0, 0
    for start, stop in bounds:
        if stop > max(start, reached):
            yield max(start, reached), stop
            reached = stop
