"""Prefill under geometric maskers (sink, local, causal) without anything of queries x keys.

On CUDA a block mask and FlexAttention; elsewhere chunks of queries, each with the keys that one of them sees.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flextok.attention.block_masks import block_mask_of
from flextok.attention.engine import attend
from flextok.attention.masks import MaskMod, and_masks
from flextok.attention.sparse import MaskerConfig, to_mask_mod, windowed_attention
from flextok.attention.sparse.windowed import chunks_of

CHUNK = 128
"""Queries at once."""


def causal_prefill(q: Tensor, k: Tensor, v: Tensor, masker_configs: Sequence[MaskerConfig], scaling: float) -> Tensor:
    """Attention `[1, queries, heads, head_dim]` of the last tokens over the earlier ones that geometric maskers choose.

    Args:
        q: `[1, heads, queries, head_dim]`; k and v `[1, kv_heads, keys, head_dim]`.
    """
    if q.device.type != "cuda":
        return windowed_attention(q, k, v, masker_configs, scaling, chunk_size=CHUNK, in_order=True)
    num_queries, num_keys = q.shape[2], k.shape[2]
    offset = num_keys - num_queries
    in_order: MaskMod = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset  # noqa: E731
    mask_mod = and_masks(to_mask_mod(masker_configs, num_queries, num_keys), in_order)
    block_mask = block_mask_of(mask_mod, num_queries, num_keys, q.device)
    return attend(q, k, v, block_mask, scale=scaling).transpose(1, 2)


def count_pairs(masker_configs: Sequence[MaskerConfig], num_queries: int, num_keys: int) -> int:
    """How many pairs of a query and a key `causal_prefill` computes in each head."""
    chunks = chunks_of(masker_configs, num_queries, num_keys, torch.device("cpu"), CHUNK, in_order=True)
    return sum(int(chunk.active.sum()) for chunk in chunks)
