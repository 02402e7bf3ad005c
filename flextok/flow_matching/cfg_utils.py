"""Classifier-free guidance (arXiv 2207.12598) and adaptive projected guidance (APG, arXiv 2410.02416)."""

import torch
from jaxtyping import Float
from torch import Tensor


class MomentumBuffer:
    """Running sum `average <- value + momentum * average`; starts at 0."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.running_average: Tensor | float = 0

    def update(self, value: Tensor) -> None:
        self.running_average = value + self.momentum * self.running_average


def classifier_free_guidance(
    conditional: Float[Tensor, "..."], unconditional: Float[Tensor, "..."], guidance_scale: float
) -> Float[Tensor, "..."]:
    """`unconditional + scale * (conditional - unconditional)`."""
    return unconditional + guidance_scale * (conditional - unconditional)


def _split_parallel(x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of `x` parallel and orthogonal to `direction` over the last three axes, computed in float64."""
    wide, axes = x.double(), (-3, -2, -1)
    unit = torch.nn.functional.normalize(direction.double().flatten(-3), dim=-1).view_as(direction)
    parallel = (wide * unit).sum(axes, keepdim=True) * unit
    return parallel.to(x.dtype), (wide - parallel).to(x.dtype)


def normalized_guidance(
    conditional: Float[Tensor, "... c h w"],
    unconditional: Float[Tensor, "... c h w"],
    guidance_scale: float,
    momentum_buffer: MomentumBuffer | None = None,
    eta: float = 0.0,
    norm_threshold: float = 2.5,
) -> Float[Tensor, "... c h w"]:
    """Guidance along the part of the difference orthogonal to the conditional prediction, its norm bounded.

    Norms and products run over the last three axes, separately for each leading index. `eta` is the share of the
    parallel part that is kept; a `norm_threshold` of 0 does not bound.
    """
    difference = conditional - unconditional
    if momentum_buffer is not None:
        momentum_buffer.update(difference)
        assert isinstance(momentum_buffer.running_average, Tensor)
        difference = momentum_buffer.running_average
    if norm_threshold > 0:
        norm = difference.flatten(-3).norm(dim=-1)[..., None, None, None]
        difference = difference * (norm_threshold / norm).clamp(max=1.0)
    parallel, orthogonal = _split_parallel(difference, conditional)
    return conditional + (guidance_scale - 1) * (orthogonal + eta * parallel)
