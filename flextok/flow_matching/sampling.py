"""Samplers: plain functions of a velocity. Samples of several sizes travel as a list of tensors `[b, c, h, w]`.

Guidance is composed around the velocity, so that no sampler knows of it:
`guided(conditional, reuse_difference(conditional, pair, every), scale_within(scale, interval), apg=...)`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeGuard

from torch import Tensor

from flextok.flow_matching.cfg_utils import MomentumBuffer, classifier_free_guidance, normalized_guidance
from flextok.flow_matching.path import Time

Samples = list[Tensor]
Velocity = Callable[[Samples, float], Samples]
VelocityPair = Callable[[Samples, float], tuple[Samples, Samples]]
GuidanceScale = float | Callable[[float], float]
Guidance = Callable[[Tensor, Tensor, float], Tensor]
Sampler = Callable[[Velocity, Samples, Sequence[Time]], Iterator[tuple[float, Samples, Samples]]]

APG_MOMENTUM = -0.5


def sample_euler(velocity: Velocity, noise: Samples, times: Sequence[Time]) -> Iterator[tuple[float, Samples, Samples]]:
    """Integrate over `times`, from noise to data, yielding `(t, x before, x after)` of each step.

    First order; N times take N - 1 steps and as many evaluations of the velocity. `path.time_grid` makes the times.
    """
    x = noise
    for t, t_next in pairwise(times):
        before, x = x, _move(x, float(t_next - t), velocity(x, float(t)))
        yield float(t), before, x


def sample_heun(velocity: Velocity, noise: Samples, times: Sequence[Time]) -> Iterator[tuple[float, Samples, Samples]]:
    """Like `sample_euler`, of second order: each step takes the mean of the velocities at both of its ends.

    A step that ends at t = 0 is one of Euler, because models are not trained there. From noise to data, n steps take
    2 n - 1 evaluations of the velocity. Source: arXiv 2206.00364, algorithm 1.
    """
    x = noise
    for t, t_next in pairwise(times):
        before, dt = x, float(t_next - t)
        slope = velocity(before, float(t))
        x = _move(before, dt, slope)
        if t_next > 0:
            slopes = zip(slope, velocity(x, float(t_next)), strict=True)
            x = _move(before, dt, [(start + end) / 2 for start, end in slopes])
        yield float(t), before, x


def _move(x: Samples, dt: float, velocity: Samples) -> Samples:
    return [sample + dt * v for sample, v in zip(x, velocity, strict=True)]


SAMPLERS: dict[str, Sampler] = {"euler": sample_euler, "heun": sample_heun}


def guided(conditional: Velocity, pair: VelocityPair, scale: GuidanceScale, *, apg: bool) -> Velocity:
    """The guided velocity, from the conditional one and from a function that gives it with the unconditional one.

    `scale` may be a function of time. Where it is exactly 1 both kinds of guidance mean the conditional velocity, so
    the unconditional one is not asked for. With `apg` each sample keeps a momentum over the evaluations that have a
    difference between the two; those at scale 1 have none and leave it as it is.
    """
    buffers: list[MomentumBuffer] = []

    def velocity(x: Samples, t: float) -> Samples:
        strength = scale(t) if callable(scale) else scale
        if strength == 1.0:
            return conditional(x, t)
        if not buffers:
            buffers.extend(MomentumBuffer(APG_MOMENTUM) for _ in x)
        combine: list[Guidance] = [
            partial(normalized_guidance, momentum_buffer=buffer) if apg else classifier_free_guidance
            for buffer in buffers
        ]
        triples = zip(combine, *pair(x, t), strict=True)
        return [guide(c, u, strength) for guide, c, u in triples]

    return velocity


def scale_within(scale: GuidanceScale, interval: Sequence[float]) -> GuidanceScale:
    """The scale at times in `interval`, both ends included, and 1.0 elsewhere: guidance that is off there.

    Close to noise guidance does harm and close to data it does little, but both cost a second pass. Source: arXiv
    2404.07724.
    """
    low, high = interval

    def scale_at(t: float) -> float:
        if not low <= t <= high:
            return 1.0
        return scale(t) if callable(scale) else scale

    return scale_at


def reuse_difference(conditional: Velocity, pair: VelocityPair, every: int) -> VelocityPair:
    """A `pair` that asks for the unconditional velocity at its first call and then at each `every`-th one.

    In between the last difference conditional - unconditional stands in for the present one, also in the momentum of
    APG. Not the unconditional velocity itself: the conditional one has moved on since, and guidance would multiply
    that by its scale. What is counted are evaluations that are guided: one per step with Euler, two with Heun.
    """
    if every == 1:
        return pair
    calls, differences = 0, list[Tensor]()

    def with_reuse(x: Samples, t: float) -> tuple[Samples, Samples]:
        nonlocal calls, differences
        fresh = calls % every == 0
        calls += 1
        if fresh:
            given, absent = pair(x, t)
            differences = [c - u for c, u in zip(given, absent, strict=True)]
            return given, absent
        given = conditional(x, t)
        return given, [c - difference for c, difference in zip(given, differences, strict=True)]

    return with_reuse


def check_sampling(
    *, sampler: object, timestep_shift: object, guidance_interval: object, guidance_every: object, prefix: str = ""
) -> None:
    """Raise a ValueError that names the option (after `prefix`), its value and what is valid."""
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ValueError(f"{prefix}sampler={sampler!r}: valid are {', '.join(SAMPLERS)}")
    if not _is_finite(timestep_shift) or timestep_shift <= 0:
        raise ValueError(f"{prefix}timestep_shift={timestep_shift!r}: valid is a positive number, 1.0 is off")
    if not _is_interval(guidance_interval):
        raise ValueError(
            f"{prefix}guidance_interval={guidance_interval!r}: valid are two times (low, high) with "
            "0 <= low <= high <= 1; (0.0, 1.0) is everything"
        )
    if isinstance(guidance_every, bool) or not isinstance(guidance_every, int) or guidance_every < 1:
        raise ValueError(
            f"{prefix}guidance_every={guidance_every!r}: valid is a whole number of at least 1, which is every time"
        )


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: object) -> bool:
    if not isinstance(value, Sequence) or len(value) != 2 or not all(map(_is_finite, value)):
        return False
    return 0 <= value[0] <= value[1] <= 1
