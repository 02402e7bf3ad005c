"""LayerNorm in float32, whatever the precision around it."""

import torch.nn.functional as F
from torch import Tensor, nn


class Fp32LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axes, computed in float32 and cast back to the input's dtype."""

    def __init__(
        self, normalized_shape: int | list[int], eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


def plain_norm(dim: int) -> nn.Module:
    """The trunks' default norm: float32 LayerNorm without parameters."""
    return Fp32LayerNorm(dim, elementwise_affine=False)
