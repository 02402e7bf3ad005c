"""Say how numbers came about: everything needed to get them again, in plain types for JSON."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import nn

from flextok.evaluation.encoding import EncodedSplit
from flextok.evaluation.judges import Judges
from flextok.evaluation.reconstruction import MIN_MS_SSIM_SIZE, PSNR_CAP, ssim_sigma, ssim_window
from flextok.evaluation.settings import EvaluationSettings
from flextok.provenance import git_revision, package_versions, weights_sha256


def build_protocol(
    *,
    encoded: EncodedSplit,
    keep_ks: Sequence[int],
    judges: Judges,
    settings: EvaluationSettings,
    data: Mapping[str, Any],
    checkpoint: Path,
    weights_file: Path,
    weights: str,
    model: nn.Module,
    device: torch.device,
    attention_backend: str,
    attention: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `protocol` of `metrics.json`, known before any point is measured."""
    return {
        "split": settings.split,
        "num_images": len(encoded.keys),
        "num_images_requested": settings.num_images,
        "image_sizes": encoded.image_sizes,
        "data": dict(data),
        "images_sha256": encoded.images_sha256,
        "transform": image_transform(data),
        "keep_ks": list(keep_ks),
        "steps": list(settings.steps),
        "sampler": settings.sampler,
        "timestep_shift": settings.timestep_shift,
        "guidance_scale": list(settings.guidance_scale),
        "perform_norm_guidance": settings.perform_norm_guidance,
        "guidance_interval": list(settings.guidance_interval),
        "guidance_every": settings.guidance_every,
        "forms": None if settings.forms is None else list(settings.forms),
        "backends": None if settings.backends is None else list(settings.backends),
        "sparse": None if settings.sparse is None else settings.sparse.written,
        "budgets": None if settings.sparse is None else list(settings.budgets),
        "targets": None if settings.targets is None else [str(target) for target in settings.targets],
        "weights": weights,
        "seed": settings.seed,
        "features": settings.features,
        "distances": settings.distances,
        "networks": judges.protocol(),
        "kid_subsets": settings.kid_subsets,
        "kid_subset_size": settings.kid_subset_size,
        "import_references": settings.import_references,
        "batch_size": settings.batch_size,
        "checkpoint": _shown(checkpoint),
        "weights_file": weights_file.name,
        "weights_sha256": weights_sha256(model),
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "device": device_name(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention_backend": attention_backend,
        "sparse_attention": attention,
        "metrics": metric_definitions(encoded.image_sizes),
    }


def _shown(path: Path) -> str:
    """Relative to the working directory where it lies below: a report says nothing else about the machine's folders."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def image_transform(data: Mapping[str, Any]) -> str | None:
    """How the data module of a config makes images of `image_size`, in words; None if it does not say."""
    return getattr(get_class(data["_target_"]), "transform", None)


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
        "ms_ssim": f"five scales; null unless all images have at least {MIN_MS_SSIM_SIZE} pixels a side",
        "ms_ssim_window": "11, sigma 1.5; borders left out, at the last scale reflected; negative parts count as zero",
        "fid": "Fréchet distance of features to those of the same images as they were read; float64, squared",
        "kid": "kernel (x·y / D + 1)^3, unbiased, mean over disjoint subsets; _se is the standard error of that mean",
        "density": "pairs of query and key that self-attention of the sparse part reads, of those allowed; all layers",
        "targets": "fewest tokens that meet it, by bisection from 1 to all of them for each image; null if all fail",
        "targets_of_features": "1 - cosine of the features of image and reconstruction, in float64",
        "seconds_per_image": "decoding with the VAE, on one process; without its first batch where there are several",
    }


def device_name(device: torch.device) -> str:
    """The kind of the device; of CUDA also the name of the GPU."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
