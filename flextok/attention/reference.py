"""Dense softmax attention: the specification every backend is tested against."""

from collections.abc import Callable

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, score_mod: ScoreMod | None = None
) -> Tensor:
    """q, k, v `[batch, heads, tokens, head_dim]`, mask bool broadcastable to the scores; masked rows give zeros."""
    scores = q @ k.transpose(-1, -2) * scale
    if score_mod is not None:
        grid = [torch.arange(n, device=q.device).view(-1, *(1,) * (3 - axis)) for axis, n in enumerate(scores.shape)]
        scores = score_mod(scores, *grid)
    if mask is None:
        return scores.softmax(-1).to(v.dtype) @ v
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0.0) @ v
