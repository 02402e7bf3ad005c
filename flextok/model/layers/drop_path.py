"""Stochastic depth."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero a residual branch for a random share of the leading indices and rescale the rest, in training only.

    In a packed row the leading axis is 1, so the whole pack is dropped or kept. Source: arXiv 1603.09382.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        kept = torch.rand((x.shape[0], *(1,) * (x.ndim - 1)), device=x.device) < keep_prob
        return x * kept.to(x.dtype) / keep_prob if keep_prob > 0.0 else torch.zeros_like(x)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"
