"""Dense softmax attention: the specification every backend is tested against."""

from collections.abc import Callable

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, score_mod: ScoreMod | None = None
) -> Tensor:
    """q, k, v `[batch, heads, tokens, head_dim]`, with fewer heads in k and v if several of q share one.

    `mask` broadcasts to the scores: bool, or floats added to them, -inf to hide a key. Masked rows give zeros.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if score_mod is not None:
        grid = [torch.arange(n, device=q.device).view(-1, *(1,) * (3 - axis)) for axis, n in enumerate(scores.shape)]
        scores = score_mod(scores, *grid)
    if mask is None:
        return scores.softmax(-1).to(v.dtype) @ v
    visible = visible_keys(mask)
    if mask.is_floating_point():
        scores = scores + mask
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0.0) @ v


def visible_keys(mask: Tensor) -> Tensor:
    """A mask of either kind as bool: True where a query sees a key."""
    return mask if mask.dtype == torch.bool else mask != float("-inf")
