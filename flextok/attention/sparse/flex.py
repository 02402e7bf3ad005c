"""`flex_masked_attention`: attention under a mask by FlexAttention, which skips tiles without active pairs.

Compiled on CUDA. Not on the CPU, where that is wrong at some sizes: there it is a check, and no faster.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flextok.attention.reference import ScoreMod
from flextok.attention.sparse.block_mask import block_mask_of_pairs, entry_of
from flextok.attention.sparse.config import Number
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.scores import additive_bias, allowed_pairs, check_shapes


def to_score_mod(mask: Mask) -> ScoreMod | None:
    """A function that adds -log p to the score of each pair, which weights it by 1 / p; None if all p are 0 or 1."""
    if mask.is_full_mask() or mask.is_empty_mask():
        return None
    probability = mask.get_dense_mask().float()
    if bool(((probability == 0) | (probability == 1)).all()):
        return None
    # Pairs that are not selected stay finite: the block mask leaves them out.
    surprise = entry_of(torch.where(probability > 0, -probability.log(), 0))
    return lambda score, b, h, q_idx, kv_idx: score + surprise(b, h, q_idx, kv_idx)


def flex_masked_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    scaling: Number,
    attention_mask: Tensor | None = None,
    block_size: int = 128,
) -> Tensor:
    """The output of `masked_attention`, `(B, Sq, H, Dv)`.

    Args:
        queries: `(B, H, Sq, D)`; keys `(B, Hkv, Sk, D)`; values `(B, Hkv, Sk, Dv)`.
        mask: `(B, H, Sq, Sk)`.
        attention_mask: None, bool (True attends) or additive, broadcastable to `(B, H, Sq, >= Sk)`.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shapes(queries, keys, values)
    shape = torch.Size((*queries.shape[:3], keys.shape[2]))
    if mask.shape != tuple(shape):
        raise ValueError(f"mask has shape {list(mask.shape)}; valid: {list(shape)}")
    active = mask.get_dense_mask() > 0
    allowed, bias = allowed_pairs(attention_mask, shape), additive_bias(attention_mask, shape)
    if allowed is not None:
        active &= allowed
    score_mod = to_score_mod(mask)
    if bias is not None:
        score_mod = _with_bias(score_mod, bias)
    attention = _attention_on(queries.device.type)
    output = attention(
        queries,
        keys,
        values,
        score_mod=score_mod,
        block_mask=block_mask_of_pairs(active, block_size),
        scale=scaling,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return output.transpose(1, 2)


def _with_bias(score_mod: ScoreMod | None, bias: Tensor) -> ScoreMod:
    """`score_mod`, and an additive attention mask on top."""
    added = entry_of(bias.float())
    if score_mod is None:
        return lambda score, b, h, q_idx, kv_idx: score + added(b, h, q_idx, kv_idx)
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, q_idx, kv_idx) + added(b, h, q_idx, kv_idx)


@cache
def _attention_on(device_type: str) -> Callable[..., Any]:
    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention) if device_type == "cuda" else attention
