"""Fréchet distance and KID against numpy, scipy and torchmetrics; order, batches and processes change nothing."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from flextok.evaluation.distribution import FeatureMoments, FeatureSample, frechet_distance, kernel_distance
from tests.evaluation.processes import in_processes


def features(count, dim, *, seed=0, shift=0.0):
    """Correlated features far from zero, where sums of squares would cancel."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mixing + 5 + shift


def keys(count):
    return [f"image-{i}" for i in range(count)]


def moments_of(*batches):
    moments = FeatureMoments()
    for batch in batches:
        moments.add(batch)
    return moments


def frechet(ours, references):
    a, b = moments_of(ours), moments_of(references)
    return frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())


def numpy_frechet(x, y):
    x, y = x.numpy().astype(np.float64), y.numpy().astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * root)


def numpy_kid(x, y):
    x, y = x.numpy().astype(np.float64), y.numpy().astype(np.float64)
    n, dim = x.shape

    def kernel(a, b):
        return (float(a @ b) / dim + 1) ** 3

    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dim"), [(50, 4), (200, 16), (400, 64)])
def test_frechet_distance_equals_scipy(count, dim):
    x, y = features(count, dim), features(count + 7, dim, seed=1, shift=0.3)
    assert frechet(x, y) == pytest.approx(numpy_frechet(x, y), rel=1e-6)


def test_frechet_distance_of_shifted_copies_is_the_square_of_the_shift():
    x = features(100, 8)
    assert frechet(x, x.double() + 0.5) == pytest.approx(8 * 0.25, abs=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_fewer_images_than_features_still_have_an_exact_distance():
    """The trace of the root is then the sum of the singular values of the product of the centred features."""
    x, y = features(20, 64).double(), features(30, 64, seed=1).double()
    a, b = (x - x.mean(0)) / 19**0.5, (y - y.mean(0)) / 29**0.5
    root = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    assert frechet(x, y) == pytest.approx(float(expected), abs=1e-6)


def test_features_that_are_all_equal_have_no_spread():
    assert frechet(torch.ones(3, 4), torch.zeros(5, 4)) == 4.0


@pytest.mark.parametrize("size", [2, 9, 24])
def test_kid_equals_a_plain_loop(size):
    x, y = features(size, 6), features(size, 6, seed=1)
    kid, error = kernel_distance(x, y, subset_size=100)
    assert kid == pytest.approx(numpy_kid(x, y), rel=1e-6)
    assert error is None


def test_kid_is_the_mean_over_disjoint_blocks():
    x, y = features(23, 6), features(22, 6, seed=1)
    values = [numpy_kid(x[i : i + 10], y[i : i + 10]) for i in (0, 10)]
    kid, error = kernel_distance(x, y, subset_size=10)
    assert kid == pytest.approx(np.mean(values), rel=1e-6)
    assert error == pytest.approx(np.std(values, ddof=1) / 2**0.5, rel=1e-6)


class Identity(torch.nn.Module):
    """Features are the pixels, whatever type torchmetrics probes with."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1).double()


def test_both_match_torchmetrics_on_the_same_features():
    x, y = (features(40, 12, seed=seed, shift=shift).view(-1, 3, 2, 2) for seed, shift in ((0, 0.0), (1, 0.2)))
    fid = FrechetInceptionDistance(feature=Identity(), normalize=True)
    kid = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=40, normalize=True)
    for metric in (fid, kid):
        metric.set_dtype(torch.float64)
        metric.update(x, real=True)
        metric.update(y, real=False)
    ours, references = y.flatten(1), x.flatten(1)
    assert frechet(ours, references) == pytest.approx(float(fid.compute()), rel=1e-6)
    expected = float(kid.compute()[0])
    assert kernel_distance(ours, references, subset_size=40)[0] == pytest.approx(expected, rel=1e-6)


# --- batches, order, processes ----------------------------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(0, 60), max_size=8),
    order=st.permutations(range(60)),
    offset=st.floats(-1e4, 1e4),
    is_merged=st.booleans(),
)
def test_batches_and_their_order_change_no_moments(cuts, order, offset, is_merged):
    x = features(60, 5).double() + offset
    parts = x[list(order)].tensor_split(sorted(cuts))
    if is_merged:
        moments = FeatureMoments()
        for part in parts:
            moments.merge(moments_of(part))
    else:
        moments = moments_of(*parts)
    assert moments.count == 60
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(moments.covariance(), x.T.cov(), rtol=1e-9, atol=1e-9)


@given(cuts=st.lists(st.integers(0, 60), max_size=8), order=st.permutations(range(60)), size=st.integers(1, 70))
def test_batches_and_their_order_change_no_sample(cuts, order, size):
    x, names = features(60, 5), keys(60)
    whole = FeatureSample(size, stream=("kid", 0))
    whole.add(x, names)
    sample = FeatureSample(size, stream=("kid", 0))
    numbers = torch.tensor(order)
    for part in numbers.tensor_split(sorted(cuts)):
        sample.add(x[part], [names[i] for i in part.tolist()])
    assert torch.equal(sample.of_all_processes(), whole.of_all_processes())
    assert len(whole.of_all_processes()) == min(size, 60)


def test_the_stream_decides_which_images_are_in_the_sample():
    samples = []
    for seed in (0, 0, 1):
        sample = FeatureSample(10, stream=("kid", seed))
        sample.add(features(60, 5), keys(60))
        samples.append(sample.of_all_processes())
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def measure_my_share(rank, world_size, count):
    x, y, names = features(count, 16), features(60, 16, seed=1), keys(count)
    moments, sample = FeatureMoments(), FeatureSample(40, stream=("kid", 0))
    mine = list(range(rank, count, world_size))
    for start in range(0, len(mine), 7):
        part = mine[start : start + 7]
        moments.add(x[part])
        sample.add(x[part], [names[i] for i in part])
    together, references = moments.of_all_processes(torch.device("cpu")), moments_of(y)
    rows = sample.of_all_processes()
    fid = frechet_distance(together.mean, together.covariance(), references.mean, references.covariance())
    return together.count, fid, kernel_distance(rows, y, subset_size=20)


@pytest.mark.parametrize(("count", "world_size"), [(61, 2), (2, 3)])
def test_several_processes_measure_what_one_does(count, world_size, tmp_path):
    """Also where one of them sees no image at all."""
    expected = measure_my_share(0, 1, count)
    for found in in_processes(measure_my_share, tmp_path, count, world_size=world_size):
        assert found[0] == expected[0] == count
        assert found[1] == pytest.approx(expected[1], rel=1e-9)
        assert found[2] == expected[2]
