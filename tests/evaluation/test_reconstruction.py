"""Metrics against what numpy and a pencil say."""

import math

import numpy as np
import pytest
import torch

from flextok.evaluation.judges import NO_JUDGES
from flextok.evaluation.point_metrics import PointMetrics
from flextok.evaluation.reconstruction import (
    MIN_MS_SSIM_SIZE,
    PSNR_CAP,
    image_metrics,
    mean_and_error,
    ms_ssim,
    ssim_sigma,
    ssim_window,
    summarize,
)
from tests.evaluation.stub import settings_with


def numpy_ssim(x, y, window):
    """Wang et al. (2004), Gaussian window, reflected borders; `x` and `y` are [C, H, W] in [0, 1]."""
    pad = [(0, 0), (window // 2, window // 2), (window // 2, window // 2)]
    x, y = np.pad(x, pad, mode="reflect"), np.pad(y, pad, mode="reflect")
    sigma = ssim_sigma(window)
    line = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * sigma**2))
    kernel = np.outer(line, line) / line.sum() ** 2
    values = []
    for a, b in zip(x, y, strict=True):
        for i in range(a.shape[0] - window + 1):
            for j in range(a.shape[1] - window + 1):
                p, q = a[i : i + window, j : j + window], b[i : i + window, j : j + window]
                mp, mq = (kernel * p).sum(), (kernel * q).sum()
                vp, vq = (kernel * (p - mp) ** 2).sum(), (kernel * (q - mq) ** 2).sum()
                cov = (kernel * (p - mp) * (q - mq)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def pair(size):
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    return images, images + 0.3 * torch.randn(images.shape, generator=generator)


@pytest.mark.parametrize("size", [3, 7, 8, 10, 11, 16, 20])
def test_metrics_equal_an_independent_computation(size):
    images, reconstructions = pair(size)
    metrics = image_metrics(reconstructions, images)
    x = np.clip((images.numpy().astype(np.float64) + 1) / 2, 0, 1)
    y = np.clip((reconstructions.numpy().astype(np.float64) + 1) / 2, 0, 1)
    for i in range(2):
        mse = np.mean((x[i] - y[i]) ** 2)
        assert metrics["mse"][i] == pytest.approx(mse, rel=1e-9)
        assert metrics["mae"][i] == pytest.approx(np.mean(np.abs(x[i] - y[i])), rel=1e-9)
        assert metrics["psnr"][i] == pytest.approx(10 * np.log10(1 / mse), rel=1e-9)
        assert metrics["ssim"][i] == pytest.approx(numpy_ssim(x[i], y[i], ssim_window(size, size)), abs=1e-6)


def test_psnr_of_black_against_mid_grey_is_six_decibels():
    metrics = image_metrics(torch.zeros(1, 3, 8, 8), -torch.ones(1, 3, 8, 8))
    assert metrics["psnr"] == [pytest.approx(20 * math.log10(2))]
    assert metrics["mae"] == [0.5]
    assert metrics["mse"] == [0.25]


def test_an_exact_copy_has_the_capped_psnr_and_ssim_one():
    images, _ = pair(8)
    metrics = image_metrics(images, images)
    assert metrics["psnr"] == [PSNR_CAP] * 2
    assert metrics["ssim"] == [pytest.approx(1)] * 2


def test_values_outside_the_range_are_clamped():
    metrics = image_metrics(torch.full((1, 3, 8, 8), 7.0), torch.ones(1, 3, 8, 8))
    assert metrics["mse"] == [0.0]


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        image_metrics(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(("side", "window"), [(3, 3), (7, 3), (8, 5), (10, 5), (11, 11), (256, 11)])
def test_the_ssim_window_shrinks_for_small_images(side, window):
    assert ssim_window(side, 256) == ssim_window(256, side) == window


def test_images_below_three_pixels_have_no_ssim():
    with pytest.raises(ValueError, match="2x8"):
        ssim_window(2, 8)


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert mean_and_error([4.0]) == (4.0, None)


def test_mean_of_psnr_and_psnr_of_mean_are_both_reported():
    truth = -torch.ones(2, 3, 8, 8)
    metrics = image_metrics(truth + torch.tensor([0.2, 2.0]).view(2, 1, 1, 1), truth)
    row = summarize({name: values for name, values in metrics.items() if values is not None})
    assert row["psnr"] == pytest.approx((20.0 + 0.0) / 2, abs=1e-5)
    assert row["psnr_of_mean_mse"] == pytest.approx(-10 * math.log10((0.01 + 1) / 2), abs=1e-5)


# --- several scales ---------------------------------------------------------------------------------------------------


def numpy_ms_ssim(x, y):
    """Wang et al. (2003): contrast and structure at five scales, luminance at the last; `[C, H, W]` in [0, 1].

    As in torchmetrics windows lie inside of the image, but at the last scale borders are reflected.
    """
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    line /= line.sum()

    def blur(image):
        image = np.apply_along_axis(np.convolve, 1, image, line, "valid")
        return np.apply_along_axis(np.convolve, 2, image, line, "valid")

    product, c1, c2 = 1.0, 0.01**2, 0.03**2
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for scale, weight in enumerate(weights):
        if scale == 4:
            x, y = (np.pad(z, [(0, 0), (5, 5), (5, 5)], mode="reflect") for z in (x, y))
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        similarity = (2 * cov + c2) / (vx + vy + c2)
        if scale == 4:
            similarity = similarity * (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        else:
            x, y = (z.reshape(3, z.shape[1] // 2, 2, z.shape[2] // 2, 2).mean((2, 4)) for z in (x, y))
        product *= max(0.0, similarity.mean()) ** weight
    return product


def test_ms_ssim_is_that_of_the_paper():
    images, reconstructions = pair(192)
    metrics = image_metrics(reconstructions, images)
    x = np.clip((images.numpy().astype(np.float64) + 1) / 2, 0, 1)
    y = np.clip((reconstructions.numpy().astype(np.float64) + 1) / 2, 0, 1)
    for i in range(2):
        assert metrics["ms_ssim"][i] == pytest.approx(numpy_ms_ssim(x[i], y[i]), abs=1e-6)


def test_ms_ssim_of_one_image_does_not_know_the_others():
    images, reconstructions = ((x.double() + 1) / 2 for x in pair(MIN_MS_SSIM_SIZE))
    together = ms_ssim(reconstructions, images)
    assert [float(ms_ssim(r[None], x[None])) for r, x in zip(reconstructions, images, strict=True)] == together.tolist()
    assert ms_ssim(images, images).tolist() == pytest.approx([1.0, 1.0])


def test_images_that_are_too_small_have_no_ms_ssim_and_leave_it_without_a_mean():
    size = MIN_MS_SSIM_SIZE
    small, large = torch.zeros(1, 3, size - 1, size), torch.zeros(1, 3, size, size)
    assert image_metrics(small, small)["ms_ssim"] is None
    metrics = PointMetrics(NO_JUDGES, settings_with())
    metrics.add(large, large, ["large"])
    assert summarize(metrics.per_image)["ms_ssim"] == pytest.approx(1)
    metrics.add(small, small, ["small"])
    row = summarize(metrics.per_image)
    assert (row["ms_ssim"], row["ms_ssim_se"]) == (None, None)
    assert row["ssim"] == pytest.approx(1)
