"""Times of a sampler: where they begin and end, how long the steps are, what the shift does to them."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flextok.flow_matching.path import shift_times, time_grid

SHIFTS = [0.25, 0.3, 1.0, 3.0]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 25, 49, 1000])
def test_without_a_shift_times_and_steps_are_the_nearest_floats(num_steps):
    grid = time_grid(num_steps)
    steps = [(float(t), float(t_next - t)) for t, t_next in pairwise(grid)]
    assert steps == [(i / num_steps, -1.0 / num_steps) for i in range(num_steps, 0, -1)]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_a_grid_runs_down_from_noise_to_data(num_steps, shift):
    grid = time_grid(num_steps, shift)
    assert len(grid) == num_steps + 1
    assert (grid[0], grid[-1]) == (1, 0)
    assert all(t > t_next for t, t_next in pairwise(grid))


def test_a_shift_above_one_takes_short_steps_at_noise_and_below_one_at_data():
    def steps(shift):
        return [float(t - t_next) for t, t_next in pairwise(time_grid(10, shift))]

    assert steps(3.0) == sorted(steps(3.0))
    assert steps(0.3) == sorted(steps(0.3), reverse=True)
    assert steps(0.25) == pytest.approx(steps(4.0)[::-1])


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -2.0)])
def test_a_grid_needs_a_step_and_a_positive_shift(num_steps, shift):
    with pytest.raises(ValueError, match=f"num_steps={num_steps}, shift={shift}.*valid"):
        time_grid(num_steps, shift)


@given(st.integers(0, 64), st.sampled_from(SHIFTS))
def test_tensors_floats_and_fractions_are_shifted_alike(step, shift):
    t = step / 64
    expected = shift_times(t, shift)
    assert isinstance(expected, float)
    assert float(shift_times(Fraction(step, 64), Fraction(shift))) == pytest.approx(expected, abs=1e-15)
    shifted = shift_times(torch.tensor([t], dtype=torch.float64), shift)
    assert shifted.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifts_compose_and_undo_each_other(shift):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_times(shift_times(t, shift), 1 / shift), t)
    torch.testing.assert_close(shift_times(shift_times(t, shift), 2.0), shift_times(t, 2 * shift))
