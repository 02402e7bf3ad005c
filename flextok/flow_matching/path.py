"""The straight path between data and noise. Time runs from 0 (data) to 1 (noise); only this file knows which is which.

Source: rectified flow, arXiv 2209.03003; mode sampling and shift of times, arXiv 2403.03206.
"""

import math
from fractions import Fraction
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

Time = float | Fraction


def interpolate(
    clean: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], t: Float[Tensor, " batch"]
) -> Float[Tensor, "batch *shape"]:
    """The point at time t of the path of each sample: `t * noise + (1 - t) * clean`."""
    t = t.view(-1, *(1,) * (clean.ndim - 1)).to(clean.dtype)
    return t * noise + (1 - t) * clean


def target_velocity(
    clean: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"]
) -> Float[Tensor, "batch *shape"]:
    """d/dt of the path: what the decoder is trained to predict."""
    return noise - clean


def time_grid(num_steps: int, shift: float = 1.0) -> list[Fraction]:
    """The `num_steps + 1` times of a sampler, from 1 (noise) to 0 (data) in equal steps, then moved by `shift_times`.

    They are exact, for differences of floats are not equal where the steps are: with 25 steps and no shift each is
    the float nearest to 1 / 25.

    Raises:
        ValueError: `num_steps` is below 1, or `shift` is not positive.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"num_steps={num_steps}, shift={shift}: valid are at least 1 step and a positive shift")
    return [shift_times(Fraction(step, num_steps), Fraction(shift)) for step in range(num_steps, -1, -1)]


def mode_times(u: Float[Tensor, " batch"], mode_scale: float) -> Float[Tensor, " batch"]:
    """Times from uniform values; `mode_scale` != 0 moves mass towards the middle (> 0) or the ends (< 0)."""
    if mode_scale == 0.0:
        return u
    return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


@overload
def shift_times(t: Float[Tensor, " batch"], shift: float) -> Float[Tensor, " batch"]: ...
@overload
def shift_times(t: float, shift: float) -> float: ...
@overload
def shift_times(t: Fraction, shift: Fraction) -> Fraction: ...
def shift_times(t: Float[Tensor, " batch"] | float | Fraction, shift: Any) -> Any:
    """Times moved towards noise (`shift` > 1) or data (< 1): `shift * t / (1 + (shift - 1) * t)`; 0 and 1 stay.

    Where few pixels say much about all others, most of the path is easy; the shift spends training, or the steps of a
    sampler, where the tokens decide. Source: arXiv 2403.03206, section 5.3.2.
    """
    return shift * t / (1 + (shift - 1) * t)


def stratified_normal(u: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Standard normal values, one in each of `batch` strata of equal probability, from uniform values."""
    strata = (torch.arange(u.shape[0], device=u.device) + u) / u.shape[0]
    return math.sqrt(2) * torch.erfinv(2 * strata - 1)
