"""Samplers: plain functions of a velocity. Samples of several sizes travel as a list of tensors `[b, c, h, w]`."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from flextok.flow_matching.cfg_utils import MomentumBuffer, classifier_free_guidance, normalized_guidance
from flextok.flow_matching.path import euler_times

Samples = list[Tensor]
Velocity = Callable[[Samples, float], Samples]
GuidanceScale = float | Callable[[float], float]
Guidance = Callable[[Tensor, Tensor, float], Tensor]

APG_MOMENTUM = -0.5


def sample_euler(velocity: Velocity, noise: Samples, num_steps: int) -> Iterator[tuple[float, Samples, Samples]]:
    """Integrate from noise (t = 1) to data (t = 0) in equal steps, yielding `(t, x before, x after)` of each."""
    x = noise
    for t, dt in euler_times(num_steps):
        before, x = x, [sample + dt * v for sample, v in zip(x, velocity(x, t), strict=True)]
        yield t, before, x


def guided(pair: Callable[[Samples, float], tuple[Samples, Samples]], scale: GuidanceScale, *, apg: bool) -> Velocity:
    """The guided velocity from a function that gives the conditional and the unconditional one.

    `scale` may be a function of time. With `apg` each sample keeps a momentum over the steps.
    """
    buffers: list[MomentumBuffer] = []

    def velocity(x: Samples, t: float) -> Samples:
        strength = scale(t) if callable(scale) else scale
        if not buffers:
            buffers.extend(MomentumBuffer(APG_MOMENTUM) for _ in x)
        combine: list[Guidance] = [
            partial(normalized_guidance, momentum_buffer=buffer) if apg else classifier_free_guidance
            for buffer in buffers
        ]
        triples = zip(combine, *pair(x, t), strict=True)
        return [guide(conditional, unconditional, strength) for guide, conditional, unconditional in triples]

    return velocity
