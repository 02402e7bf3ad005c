"""What samplers promise, measured over independent draws; `pytest -rP` shows numbers of draws and intervals.

The rows of one call are independent, so a query repeated in n heads gives n draws.
"""

import math
import sys

import pytest
import torch

from flextok.attention.sparse import Mask
from flextok.attention.sparse.scores import logits
from tests.attention.sparse.vectors import attention_of, recorded

HEAD = [{"type": "SinkMasker", "sink_size": 4}, {"type": "OracleTopK", "heavy_size": 6}]
AROUND = [
    {"type": "SinkMasker", "sink_size": 8},
    {"type": "LocalMasker", "window_size": 8},
    {"type": "OracleTopK", "heavy_size": 20},
]


def random_sampling(rate):
    return {"type": "RandomSamplingMasker", "sampling_rate": rate}


def adaptive(epsilon, delta, base=0.2, offset=0):
    common = {"init_offset": offset, "local_offset": offset, "base_rate_sampling": base}
    return {"type": "AdaptiveSamplingMasker", "epsilon": epsilon, "delta": delta} | common


class Problem:
    """One query, its keys, and the exact sums that samplers estimate."""

    def __init__(self, query, keys, values, scaling):
        self.query, self.keys, self.values, self.scaling = query, keys, values, scaling
        scores = logits(query.double(), keys.double(), scaling, None)[0, 0, 0]
        self.terms = (scores - scores.max()).exp()
        self.parts = self.terms[:, None] * values[0, 0].double()

    def values_of(self, specs, num_draws, seed, **kwargs):
        """Values of the mask, `(draws, Sk)`."""
        queries = self.query.expand(1, num_draws, 1, -1)
        generator = torch.Generator().manual_seed(seed)
        common = (queries, self.keys, self.values, None, self.scaling, 0.0, {})
        mask = attention_of(specs).build_mask(*common, layer_idx=0, generator=generator, **kwargs)
        return mask.get_dense_mask()[0, :, 0].double()

    def denominators(self, values):
        """Estimates as shares of the truth, `(draws,)`."""
        return weighted(values) @ self.terms / self.terms.sum()


def weighted(values):
    return torch.where(values > 0, 1 / values, 0)


def stored(name):
    case, tensors = recorded("stat")[name]
    return Problem(tensors["q"], tensors["k"], tensors["v"], case["scaling"])


def gaussian(num_keys, width=32, seed=5):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, width, generator=generator) for n in (1, num_keys, num_keys))
    return Problem(q, k, v, width**-0.5)


def report(text):
    sys.stdout.write(text + "\n")


def assert_unbiased(what, estimates, truth=1.0, errors=5):
    mean, error = estimates.mean(0), estimates.std(0) / math.sqrt(len(estimates))
    low, high = (float((mean + sign * errors * error).flatten()[0]) for sign in (-1, 1))
    report(f"{what}: {len(estimates)} draws, mean in [{low:.4f}, {high:.4f}]")
    assert ((mean - truth).abs() <= errors * error + 1e-9).all(), what


@pytest.mark.parametrize("name", recorded("stat"))
def test_the_yardsticks_are_the_recorded_ones(name):
    _, tensors = recorded("stat")[name]
    problem = stored(name)
    torch.testing.assert_close(problem.terms.float(), tensors["exp"].flatten(), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(problem.terms.sum().float(), tensors["den"].flatten()[0], rtol=2e-5, atol=0)
    torch.testing.assert_close(problem.parts.sum(0).float(), tensors["num"].flatten(), rtol=2e-5, atol=1e-4)


# --- random sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
def test_every_row_holds_as_many_distinct_keys_and_each_key_is_as_likely(rate):
    num_draws = 2000
    values = stored("stat0").values_of([random_sampling(rate)], num_draws, seed=1)
    count = max(1, int(rate * 64))
    assert ((values > 0).sum(-1) == count).all()
    assert torch.equal(values[values > 0], torch.tensor(count / 64).double().expand(num_draws * count))
    frequency = (values > 0).double().mean(0)
    bound = 5.5 * math.sqrt(0.25 / num_draws)
    report(
        f"rate {rate}: {num_draws} draws, largest deviation {(frequency - count / 64).abs().max():.4f} <= {bound:.4f}"
    )
    assert ((frequency - count / 64).abs() <= bound).all()


CASES = [
    *[("stat0", head, random_sampling(rate)) for head in ([], HEAD) for rate in (0.1, 0.5)],
    *[("stat1", head, random_sampling(rate)) for head in ([], HEAD) for rate in (0.05, 0.3)],
    *[("stat1", head, adaptive(0.25, 0.25)) for head in ([], HEAD)],
]


@pytest.mark.parametrize(("name", "head", "sampler"), CASES)
def test_numerator_and_denominator_are_unbiased(name, head, sampler):
    problem = stored(name)
    values = problem.values_of([*head, sampler], 2000 if name == "stat0" else 800, seed=2)
    assert_unbiased(f"{sampler['type']} {name} denominator", problem.denominators(values))
    assert_unbiased(f"{sampler['type']} {name} numerator", weighted(values) @ problem.parts, problem.parts.sum(0))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head", "sampler"), CASES)
def test_numerator_and_denominator_are_unbiased_over_many_seeds(name, head, sampler):
    problem = stored(name)
    values = torch.cat([problem.values_of([*head, sampler], 800, seed) for seed in range(50)])
    assert_unbiased(f"{sampler['type']} {name} denominator", problem.denominators(values))
    assert_unbiased(f"{sampler['type']} {name} numerator", weighted(values) @ problem.parts, problem.parts.sum(0))


# --- MagicPig ---------------------------------------------------------------------------------------------------------


def magic_pig_ratios(problem, num_seeds, min_tables, tables, bits):
    spec = {"type": "MagicPig", "lsh_l": tables, "lsh_k": bits, "min_tables": min_tables}
    return torch.cat([problem.denominators(problem.values_of([spec | {"seed": s}], 1, s)) for s in range(num_seeds)])


@pytest.mark.parametrize("min_tables", [1, 2])
def test_magic_pig_is_unbiased_over_seeds(min_tables):
    ratios = magic_pig_ratios(stored("stat1"), 400, min_tables, 16, 4)
    assert_unbiased(f"MagicPig, {min_tables} tables, L=16 K=4", ratios)


@pytest.mark.slow
@pytest.mark.parametrize("min_tables", [1, 2])
@pytest.mark.parametrize(("tables", "bits"), [(8, 8), (16, 4), (75, 8)])
def test_magic_pig_is_unbiased_over_many_seeds(tables, bits, min_tables):
    ratios = magic_pig_ratios(stored("stat1"), 3000, min_tables, tables, bits)
    assert_unbiased(f"MagicPig, {min_tables} tables, L={tables} K={bits}", ratios)


# --- adaptive sampling ------------------------------------------------------------------------------------------------

PAIRS = [(0.15, 0.05, []), (0.1, 0.2, []), (0.1, 0.1, AROUND), (0.2, 0.3, AROUND)]
LENGTHS = [1024, 1531]


def failure_rate(num_keys, epsilon, delta, head, num_draws, seed):
    problem = gaussian(num_keys)
    values = problem.values_of([*head, adaptive(epsilon, delta, offset=8 if head else 0)], num_draws, seed)
    return (problem.denominators(values) - 1).abs() > epsilon


def assert_held(what, failed, delta):
    num_draws, rate = len(failed), float(failed.double().mean())
    bound = delta + 4 * math.sqrt(delta * (1 - delta) / num_draws) + 0.02
    spread = 1.96 * math.sqrt(max(rate * (1 - rate), 1 / num_draws) / num_draws)
    report(f"{what}: {num_draws} draws, failures {rate:.4f} +- {spread:.4f}, delta {delta}, bound {bound:.4f}")
    assert rate <= bound


@pytest.mark.parametrize(("epsilon", "delta", "head"), PAIRS)
@pytest.mark.parametrize("num_keys", LENGTHS)
def test_the_error_stays_below_epsilon_as_often_as_promised(num_keys, epsilon, delta, head):
    assert_held(f"{num_keys} keys, epsilon {epsilon}", failure_rate(num_keys, epsilon, delta, head, 800, 3), delta)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "delta", "head"), PAIRS)
@pytest.mark.parametrize("num_keys", LENGTHS)
def test_the_error_stays_below_epsilon_over_many_seeds(num_keys, epsilon, delta, head):
    failed = torch.cat([failure_rate(num_keys, epsilon, delta, head, 800, seed) for seed in range(25)])
    assert_held(f"{num_keys} keys, epsilon {epsilon}", failed, delta)


@pytest.mark.parametrize(("epsilon", "delta", "head"), PAIRS)
@pytest.mark.parametrize("num_keys", LENGTHS)
def test_as_many_keys_are_drawn_as_the_bound_says(num_keys, epsilon, delta, head):
    problem = gaussian(num_keys)
    values = problem.values_of([*head, adaptive(epsilon, delta, offset=8 if head else 0)], 800, seed=4)
    held = problem.values_of(head, 1, seed=4)[0] if head else torch.zeros(num_keys)
    rest = problem.terms[held == 0]
    quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - delta, dtype=torch.float64)))
    bound = (quantile * len(rest) * rest.std() / (epsilon * problem.terms.sum())) ** 2
    expected = min(max(math.ceil(bound), int(0.2 * len(rest))), len(rest))
    drawn = float(((values > 0).sum(-1) - (held > 0).sum()).double().mean())
    report(f"{num_keys} keys, epsilon {epsilon}: 800 draws, {drawn:.1f} keys on average, formula {expected}")
    assert 0.85 <= drawn / expected <= 1.15


def test_the_budget_is_the_bound_of_the_paper():
    """By hand, from one base sample: two-sided, rounded up."""
    masker = attention_of([adaptive(0.1, 0.05)]).maskers[0]
    terms = torch.rand(1, 1, 1, 900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = torch.arange(900).reshape(terms.shape) < 30
    sizes = [torch.full((1, 1, 1, 1), n) for n in (30, 900)]
    budget = masker._budget(terms, base, sizes[0], torch.full((1, 1, 1, 1), 5.0).double(), sizes[1])
    sample = terms[base]
    expected = (1.959964 * 900 * sample.std() / (0.1 * (5 + 900 * sample.mean()))) ** 2
    assert int(budget) == math.ceil(expected) > 30


@pytest.mark.parametrize("head", [[], AROUND])
def test_a_tiny_epsilon_takes_every_key_with_certainty(head):
    values = gaussian(300).values_of([*head, adaptive(1e-4, 0.05, offset=8 if head else 0)], 20, seed=5)
    assert torch.equal(values, torch.ones_like(values))


@pytest.mark.parametrize("sampler", [random_sampling(0.2), adaptive(0.2, 0.2)])
def test_equal_generators_draw_equal_masks(sampler):
    problem = gaussian(200)
    assert torch.equal(problem.values_of([sampler], 30, 6), problem.values_of([sampler], 30, 6))
    assert not torch.equal(problem.values_of([sampler], 30, 6), problem.values_of([sampler], 30, 7))


def test_keys_with_fractions_count_as_estimates_in_the_budget():
    """An earlier mask that already samples the rest: nothing is left to draw, and its values stay."""
    problem = gaussian(100)
    values = torch.full((1, 1, 1, 100), 0.5)
    mask = Mask.create_mask_from_dense_mask(values.shape, values, torch.float32)
    masker = attention_of([adaptive(0.1, 0.1)]).maskers[0]
    tensors = {"keys": problem.keys, "queries": problem.query, "values": problem.values, "attention_mask": None}
    added = masker.add_mask(**tensors, scaling=1.0, dropout=0.0, sparse_meta_data={}, previous_mask=mask)
    assert torch.equal(added.get_dense_mask(), values)
