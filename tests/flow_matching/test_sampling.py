"""Samplers on equations whose solution is known, and guidance on velocities that are counted."""

import math

import pytest
import torch

from flextok.flow_matching.cfg_utils import MomentumBuffer, normalized_guidance
from flextok.flow_matching.path import time_grid
from flextok.flow_matching.sampling import (
    APG_MOMENTUM,
    SAMPLERS,
    guided,
    reuse_difference,
    sample_euler,
    sample_heun,
    scale_within,
)

ORDERS = {"euler": 1, "heun": 2}
# dx/dt and x(0) for x(1) = 1.
EQUATIONS = {
    "growth": (lambda x, t: 0.8 * x, math.exp(-0.8)),
    "decay": (lambda x, t: -1.5 * x, math.exp(1.5)),
    "time dependent": (lambda x, t: math.cos(2 * t) * x, math.exp(-math.sin(2) / 2)),
    "of time alone": (lambda x, t: torch.full_like(x, math.exp(t)), 2 - math.e),
}


def latents(value=1.0):
    return [torch.full((1, 1, 1, 1), value, dtype=torch.float64)]


def integrate(sampler, derivative, times):
    def velocity(x, t):
        return [derivative(sample, t) for sample in x]

    *_, (_, _, x) = SAMPLERS[sampler](velocity, latents(), times)
    return x[0].item()


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_error_falls_with_the_order_of_the_sampler(sampler, equation, shift):
    derivative, solution = EQUATIONS[equation]
    coarse, fine = (
        abs(integrate(sampler, derivative, time_grid(num_steps, shift)) - solution) for num_steps in (400, 800)
    )
    assert fine > 1e-9, "solved exactly: this test would prove nothing"
    assert math.log2(coarse / fine) == pytest.approx(ORDERS[sampler], abs=0.1)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_heun_is_closer_at_the_same_number_of_evaluations(equation):
    derivative, solution = EQUATIONS[equation]
    euler = abs(integrate("euler", derivative, time_grid(19)) - solution)
    heun = abs(integrate("heun", derivative, time_grid(10)) - solution)
    assert heun < euler / 2


def test_heun_is_exact_for_a_velocity_linear_in_time_but_for_the_step_to_data():
    def linear(x, t):
        return torch.full_like(x, 2 * t)

    assert integrate("heun", linear, [1.0, 0.75, 0.5, 0.25]) == 0.25**2
    assert integrate("heun", linear, [1.0, 0.75, 0.5, 0.25, 0.0]) == 0.25**2 - 0.25 * 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_the_times_of_the_evaluations(sampler, num_steps):
    seen = []

    def velocity(x, t):
        assert isinstance(t, float)
        seen.append(t)
        return x

    states = list(SAMPLERS[sampler](velocity, latents(), time_grid(num_steps)))
    starts = [i / num_steps for i in range(num_steps, 0, -1)]
    assert [t for t, _, _ in states] == starts
    assert seen == (starts if sampler == "euler" else starts[:1] + [t for t in starts[1:] for _ in range(2)])
    assert len(seen) == (num_steps if sampler == "euler" else 2 * num_steps - 1)
    assert min(seen) > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_begins_where_the_last_one_ended_and_changes_no_input(sampler):
    noise = latents()
    states = list(SAMPLERS[sampler](lambda x, t: [sample * t for sample in x], noise, time_grid(4)))
    assert noise[0] == 1
    assert states[0][1] is noise
    for (_, _, after), (_, before, _) in zip(states, states[1:], strict=False):
        assert before is after


def test_one_step_of_heun_is_one_of_euler():
    (euler,), (heun,) = (list(s(lambda x, t: x, latents(), time_grid(1))) for s in (sample_euler, sample_heun))
    assert torch.equal(euler[2][0], heun[2][0])


# Guidance


class Counted:
    """A conditional and an unconditional velocity that write down at which times each was asked for."""

    def __init__(self):
        self.conditional_times, self.pair_times = [], []
        generator = torch.Generator().manual_seed(1)
        self.directions = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)

    def values(self, x, t):
        a, b, c, d = self.directions
        return [s + a + t * b for s in x], [s * 0.5 + c + t * t * d for s in x]

    def conditional(self, x, t):
        self.conditional_times.append(t)
        return self.values(x, t)[0]

    def pair(self, x, t):
        self.pair_times.append(t)
        return self.values(x, t)


@pytest.fixture
def counted():
    return Counted()


@pytest.fixture
def x():
    return list(torch.randn(2, 1, 3, 4, 4, dtype=torch.float64))


TIMES = [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("apg", [False, True])
@pytest.mark.parametrize("scale", [1.0, lambda t: 1.0], ids=["number", "function"])
def test_scale_one_is_the_conditional_velocity_alone(counted, x, scale, apg):
    velocity = guided(counted.conditional, counted.pair, scale, apg=apg)
    for t in TIMES:
        assert all(map(torch.equal, velocity(x, t), counted.values(x, t)[0]))
    assert counted.pair_times == []


def test_guidance_of_scale_zero_is_the_unconditional_velocity(counted, x):
    velocity = guided(counted.conditional, counted.pair, 0.0, apg=False)
    assert all(map(torch.equal, velocity(x, 0.5), counted.values(x, 0.5)[1]))


@pytest.mark.parametrize(
    ("interval", "inside"),
    [
        ((0.0, 1.0), TIMES),
        ((0.25, 0.75), [0.75, 0.5, 0.25]),
        ((0.5, 0.5), [0.5]),
        ((0.3, 0.6), [0.5]),
        ((0.8, 0.9), []),
        ((0.0, 0.2), []),
    ],
)
@pytest.mark.parametrize("scale", [3.0, lambda t: 2.0 + t], ids=["number", "function"])
def test_the_interval_holds_both_its_ends_and_outside_guidance_is_off(interval, inside, scale):
    within = scale_within(scale, interval)
    for t in TIMES:
        inner = scale(t) if callable(scale) else scale
        assert within(t) == (inner if t in inside else 1.0)


def test_a_schedule_is_not_asked_outside_of_the_interval():
    seen = []
    within = scale_within(lambda t: seen.append(t) or 2.0, (0.4, 0.8))
    assert [within(t) for t in TIMES] == [1.0, 2.0, 2.0, 1.0]
    assert seen == [0.75, 0.5]


def test_every_evaluation_by_default_asks_the_pair_itself(counted):
    assert reuse_difference(counted.conditional, counted.pair, 1) == counted.pair


@pytest.mark.parametrize(("every", "fresh"), [(2, [1.0, 0.5]), (3, [1.0, 0.25]), (4, [1.0]), (9, [1.0])])
def test_every_nth_evaluation_is_fresh_and_the_others_reuse_the_last_difference(counted, x, every, fresh):
    pair = reuse_difference(counted.conditional, counted.pair, every)
    difference = None
    for t in TIMES:
        given, absent = counted.values(x, t)
        if t in fresh:
            difference = [c - u for c, u in zip(given, absent, strict=True)]
        conditional, stand_in = pair(x, t)
        assert all(map(torch.equal, conditional, given))
        expected = [c - d for c, d in zip(given, difference, strict=True)]
        torch.testing.assert_close(stand_in, expected, rtol=0, atol=1e-12)
    assert counted.pair_times == fresh
    assert counted.conditional_times == [t for t in TIMES if t not in fresh]


def test_only_guided_evaluations_are_counted(counted, x):
    def schedule(t):
        return 1.0 if t == 0.75 else 2.0

    pair = reuse_difference(counted.conditional, counted.pair, 2)
    velocity = guided(counted.conditional, pair, schedule, apg=False)
    for t in TIMES:
        velocity(x, t)
    assert counted.pair_times == [1.0, 0.25]
    assert counted.conditional_times == [0.75, 0.5]


def test_normalised_guidance_reuses_the_same_difference_and_skips_unguided_times(counted, x):
    pair = reuse_difference(counted.conditional, counted.pair, 2)
    velocity = guided(counted.conditional, pair, scale_within(5.0, (0.0, 0.8)), apg=True)
    given = counted.values(x, 1.0)[0]
    assert all(map(torch.equal, velocity(x, 1.0), given))
    buffers, differences = [MomentumBuffer(APG_MOMENTUM) for _ in x], None
    for t in (0.75, 0.5, 0.25):
        given, absent = counted.values(x, t)
        if t != 0.5:
            differences = [c - u for c, u in zip(given, absent, strict=True)]
        expected = [
            normalized_guidance(c, c - d, 5.0, momentum_buffer=b)
            for c, d, b in zip(given, differences, buffers, strict=True)
        ]
        torch.testing.assert_close(velocity(x, t), expected, rtol=0, atol=1e-10)
    assert counted.pair_times == [0.75, 0.25]
