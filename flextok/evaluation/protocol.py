"""Say how numbers came about: everything needed to get them again, in plain types for JSON."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flextok.evaluation.reconstruction import PSNR_CAP, ssim_sigma, ssim_window
from flextok.evaluation.settings import EvaluationSettings
from flextok.evaluation.sweep import SweepResult
from flextok.provenance import git_revision, package_versions


def build_protocol(
    *,
    sweep: SweepResult,
    settings: EvaluationSettings,
    data: Mapping[str, Any],
    checkpoint: Path,
    weights_file: Path,
    weights: str,
    device: torch.device,
    dtype: torch.dtype,
    attention_backends: Sequence[str],
) -> dict[str, Any]:
    """The `protocol` of `metrics.json`."""
    return {
        "split": settings.split,
        "num_images": sweep.num_images,
        "num_images_requested": settings.num_images,
        "image_sizes": sweep.image_sizes,
        "data": dict(data),
        "keep_ks": [result["keep_k"] for result in sweep.results],
        "steps": settings.steps,
        "sampler": settings.sampler,
        "timestep_shift": settings.timestep_shift,
        "guidance_scale": settings.guidance_scale,
        "perform_norm_guidance": settings.perform_norm_guidance,
        "guidance_interval": list(settings.guidance_interval),
        "guidance_every": settings.guidance_every,
        "weights": weights,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "checkpoint": _shown(checkpoint),
        "weights_file": weights_file.name,
        "weights_sha256": weights_sha256(weights_file),
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention_backends": list(attention_backends),
        "metrics": metric_definitions(sweep.image_sizes),
    }


def _shown(path: Path) -> str:
    """Relative to the working directory where it lies below: a report says nothing else about the machine's folders."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def metric_definitions(image_sizes: list[list[int]]) -> dict[str, Any]:
    """What the metrics of images of these sizes mean."""
    windows = sorted({ssim_window(height, width) for height, width in image_sizes})
    return {
        "data_range": "[-1, 1] mapped to [0, 1] and clamped, not rounded to 8 bits",
        "precision": "float64 per image, then the mean over images; _se is the standard error of that mean",
        "psnr_cap_db": PSNR_CAP,
        "ssim_windows": windows,
        "ssim_borders": "reflected",
        "ssim_sigmas": [ssim_sigma(window) for window in windows],
        "seconds_per_image": "decoding with the VAE; without the first batch where there are several",
    }


def weights_sha256(path: Path) -> str:
    """Of a file; of a checkpoint that is a folder, that of its `meta.pt`, which holds the sums of all its files."""
    from flextok.training.sharded_checkpoint import META

    with (path / META if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def device_name(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
