"""How close is a reconstruction to its image? PSNR, SSIM, MS-SSIM, MAE and MSE, one number per image, in float64.

All of them compare images mapped from [-1, 1] to [0, 1] and clamped there; nothing is rounded to 8 bits.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

METRICS = ("psnr", "ssim", "ms_ssim", "mae", "mse")
# An exact copy has infinite PSNR, which neither a mean nor JSON can hold.
PSNR_CAP = 100.0
# Below, the window of 11 pixels does not fit the last of the five scales as torchmetrics wants it.
MIN_MS_SSIM_SIZE = 176


def image_metrics(reconstructions: Tensor, images: Tensor) -> dict[str, list[float] | None]:
    """Metrics of every image of a batch.

    Args:
        reconstructions: `[B, 3, H, W]`, nominally in [-1, 1].
        images: `[B, 3, H, W]` in [-1, 1].

    Returns:
        For each name in `METRICS` a list of B numbers; None for `ms_ssim` of images below `MIN_MS_SSIM_SIZE`.
    """
    if reconstructions.shape != images.shape:
        raise ValueError(
            f"reconstructions {tuple(reconstructions.shape)} and images {tuple(images.shape)} differ in shape"
        )
    ours, truth = to_unit_range(reconstructions), to_unit_range(images)
    difference = (ours - truth).flatten(1)
    mse = difference.square().mean(dim=1)
    return {
        "psnr": [psnr_of_mse(value) for value in mse.tolist()],
        "ssim": ssim(ours, truth).tolist(),
        "ms_ssim": None if min(truth.shape[-2:]) < MIN_MS_SSIM_SIZE else ms_ssim(ours, truth).tolist(),
        "mae": difference.abs().mean(dim=1).tolist(),
        "mse": mse.tolist(),
    }


def to_unit_range(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clamped, float64 (on the CPU where the device has no float64)."""
    images = images.detach()
    images = images.cpu() if images.device.type == "mps" else images
    return ((images.double() + 1) / 2).clamp(0, 1)


def psnr_of_mse(mse: float) -> float:
    """Peak signal-to-noise ratio in dB for a data range of 1, at most `PSNR_CAP`."""
    return PSNR_CAP if mse <= 10 ** (-PSNR_CAP / 10) else -10 * math.log10(mse)


def psnr(reconstructions: Tensor, images: Tensor) -> list[float]:
    """PSNR in dB of each of `[B, 3, H, W]` images in [0, 1]; one image may stand for all, `[1, 3, H, W]`."""
    return [psnr_of_mse(mse) for mse in (reconstructions - images).square().flatten(1).mean(1).tolist()]


def ssim_window(height: int, width: int) -> int:
    """Side of the Gaussian window in pixels: the usual 11, but 5 if a side is below 11, and 3 if below 8.

    A window as large as a tiny image would look at its centre only.
    """
    side = min(height, width)
    if side < 3:
        raise ValueError(f"image size {height}x{width}: SSIM needs at least 3 pixels on each side")
    return 11 if side >= 11 else 5 if side >= 8 else 3


def ssim_sigma(window: int) -> float:
    """Width of the Gaussian, in the proportion of the usual pair: 1.5 for a window of 11."""
    return 1.5 * window / 11


def ssim(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of `[B, 3, H, W]` images in [0, 1]: `[B]`; see `ssim_window` for small images."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    # torchmetrics derives the window from sigma; it reflects the borders, so that every pixel is a centre.
    values = structural_similarity_index_measure(
        reconstructions,
        images,
        gaussian_kernel=True,
        sigma=ssim_sigma(ssim_window(images.shape[-2], images.shape[-1])),
        data_range=1.0,
        reduction="none",
    )
    assert isinstance(values, Tensor)
    return values.reshape(len(images))


def ms_ssim(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Structural similarity at five scales of `[B, 3, H, W]` images in [0, 1]: `[B]`; negative parts count as zero."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    values = multiscale_structural_similarity_index_measure(
        reconstructions, images, data_range=1.0, reduction="none", normalize="relu"
    )
    return values.reshape(len(images))


def summarize(numbers: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Mean and standard error (`<name>_se`) of the numbers of each image, and `psnr_of_mean_mse`.

    One image without a number (NaN), such as one that is too small, leaves None for all. Their order changes nothing.
    """
    row: dict[str, float | None] = {}
    for name, values in numbers.items():
        known = not any(math.isnan(value) for value in values)
        row[name], row[f"{name}_se"] = mean_and_error(values) if known else (None, None)
    assert row["mse"] is not None
    row["psnr_of_mean_mse"] = psnr_of_mse(row["mse"])
    return row


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; one value alone has none. `fsum` makes both independent of the order."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)
