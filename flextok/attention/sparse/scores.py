"""Logits and what an attention mask allows: the arithmetic that maskers and attention share.

Grouped heads: query head h reads key and value head `h // (H / Hkv)`, which is never repeated in memory for a logit.
Scores are computed in float32, in float64 for float64 inputs.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flextok.attention.sparse.config import Number


def check_shapes(queries: Tensor, keys: Tensor, values: Tensor | None = None) -> None:
    """ValueError unless these are queries `(B, H, Sq, D)`, keys `(B, Hkv, Sk, D)`, values `(B, Hkv, Sk, Dv)`."""
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if tensor is not None and tensor.ndim != 4:
            raise ValueError(f"{name} have shape {list(tensor.shape)}; valid: [batch, heads, tokens, width]")
    if keys.shape[0] != queries.shape[0] or keys.shape[3] != queries.shape[3]:
        raise ValueError(f"keys have shape {list(keys.shape)}, queries {list(queries.shape)}: batch or width differ")
    if keys.shape[1] == 0 or queries.shape[1] % keys.shape[1]:
        raise ValueError(f"{queries.shape[1]} query heads and {keys.shape[1]} key heads; valid: a multiple of them")
    if values is not None and values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"values have shape {list(values.shape)}, keys {list(keys.shape)}: batch, heads or tokens differ"
        )


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """`(B, H, Sq, W)` as `(B, Hkv, H / Hkv * Sq, W)`: the rows that read each key and value head."""
    batch, num_heads, num_rows, width = x.shape
    return x.reshape(batch, num_kv_heads, num_heads // num_kv_heads * num_rows, width)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(B, Hkv, ...)` as `(B, H, ...)`, each head H / Hkv times in a row."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def logits(queries: Tensor, keys: Tensor, scaling: Number, attention_mask: Tensor | None) -> Float[Tensor, "B H Sq Sk"]:
    """`scaling * q . k`, plus an additive attention mask."""
    check_shapes(queries, keys)
    dtype = work_dtype(queries.dtype)
    products = grouped(queries.to(dtype), keys.shape[1]) @ keys.to(dtype).transpose(-1, -2)
    scores = products.reshape(*queries.shape[:3], keys.shape[2]) * scaling
    bias = additive_bias(attention_mask, scores.shape)
    return scores if bias is None else scores + bias.to(dtype)


def additive_bias(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """What an attention mask adds to logits of `shape` `(B, H, Sq, Sk)`, broadcastable; None for nothing."""
    fitted = _fitted(attention_mask, shape)
    return None if fitted is None or fitted.dtype == torch.bool else fitted


def allowed_pairs(attention_mask: Tensor | None, shape: torch.Size) -> Bool[Tensor, "#B #H #Sq #Sk"] | None:
    """Where an attention mask lets pairs of `shape` `(B, H, Sq, Sk)` attend, broadcastable; None for everywhere.

    Raises:
        ValueError: the mask is neither boolean nor of floats, or does not fit.
    """
    fitted = _fitted(attention_mask, shape)
    if fitted is None or fitted.dtype == torch.bool:
        return fitted
    return fitted > torch.finfo(fitted.dtype).min / 2


def _fitted(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask in four dimensions without the columns past the last key."""
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.bool and not attention_mask.dtype.is_floating_point:
        raise ValueError(f"attention_mask is of {attention_mask.dtype}; valid: bool (True attends) or floats to add")
    cut = attention_mask[..., : shape[-1]] if attention_mask.ndim else attention_mask
    if cut.ndim > 4 or any(mine not in (1, whole) for mine, whole in zip(cut.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; valid: broadcastable to {list(shape)}, "
            "with as many or more columns"
        )
    return cut.reshape(*(1,) * (4 - cut.ndim), *cut.shape)
