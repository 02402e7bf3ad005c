"""What reconstructions are compared with as a set: statistics of the evaluated images, computed once and kept.

A file (`.npz`) holds `mu` `[D]` and `sigma` `[D, D]` in float64, under the names that other FID tools read, `sample`
`[n, D]` for KID, and `about`, JSON that says which images went through which network.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextok.evaluation.distribution import FeatureMoments, FeatureSample
from flextok.evaluation.features import FeatureExtractor
from flextok.evaluation.images import ImageSetHash
from flextok.evaluation.processes import of_first_process
from flextok.utils.checkpoint import atomic_path

logger = logging.getLogger(__name__)

Batches = Iterable[tuple[Tensor, Sequence[str]]]
# Chooses the images of the sample; other than that of reconstructions, because KID wants samples that are independent.
_STREAM = ("kid references",)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Mean `[D]` and covariance `[D, D]` of the features of `about["num_images"]` images, and a sample `[n, D]`."""

    mean: Tensor
    covariance: Tensor
    sample: Tensor
    about: dict[str, Any]

    def save(self, file: Path) -> None:
        """Write a file, whole or not at all."""
        tensors = {"mu": self.mean, "sigma": self.covariance, "sample": self.sample}
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        arrays["about"] = np.array(json.dumps(self.about))
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)

    @classmethod
    def load(cls, file: Path) -> "Reference":
        """Read a file. Raises ValueError where there is none, or not such a one."""
        try:
            with np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                mean, covariance, sample = (torch.from_numpy(stored[name]) for name in ("mu", "sigma", "sample"))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{file} holds no reference statistics ({error}); valid: a file that evaluation.export_references "
                "wrote. In a cache it may be deleted, and is computed again"
            ) from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or sample.shape[1:] != mean.shape:
            raise ValueError(f"{file}: mu, sigma and sample do not fit each other")
        return cls(mean=mean, covariance=covariance, sample=sample, about=about)


def images_sum(batches: Batches) -> str:
    """The content hash of all images; see `ImageSetHash`."""
    content = ImageSetHash()
    for images, keys in batches:
        content.add(images, keys)
    return content.of_all_processes()


def cached_references(
    extractors: Mapping[str, FeatureExtractor],
    read_images: Callable[[], Batches],
    *,
    images_sha256: str,
    sample_size: int,
    cache: Path,
    device: torch.device,
) -> dict[str, Reference]:
    """A reference for each extractor, from files in `cache` where they are there; the others are computed and kept.

    Args:
        read_images: goes over the images from the start; called only if something is to be computed.
        images_sha256: their content hash.
        sample_size: most features that are kept for KID.

    Raises:
        ValueError: a file in the cache is damaged, or there are fewer than two images.
    """
    from flextok.training.distributed import of_all_ranks

    wanted = {
        name: {**identity(extractor), "images_sha256": images_sha256, "sample_size": sample_size}
        for name, extractor in extractors.items()
    }
    files = {name: cache / f"{_sum(about)}.npz" for name, about in wanted.items()}
    # What one process does not see, all of them compute.
    unknown = [name for name, file in files.items() if not all(of_all_ranks(file.exists()))]
    found = {name: Reference.load(file) for name, file in files.items() if name not in unknown}
    for name, reference in found.items():
        if {key: reference.about.get(key) for key in wanted[name]} != wanted[name]:
            raise ValueError(f"{files[name]} belongs to other images or another network; delete it")
    if unknown:
        logger.info("computing references of %s", ", ".join(unknown))
        computed = compute_references({name: extractors[name] for name in unknown}, read_images(), sample_size, device)
        for name, reference in computed.items():
            reference.about.update(wanted[name])
            of_first_process(partial(reference.save, files[name]))
            found[name] = reference
    return {name: found[name] for name in extractors}


def imported_references(extractors: Mapping[str, FeatureExtractor], folder: Path) -> dict[str, Reference]:
    """Those in `<folder>/<name>.npz`. Raises ValueError for files that are missing or of another network."""
    references = {name: Reference.load(folder / f"{name}.npz") for name in extractors}
    for name, reference in references.items():
        for key, ours in identity(extractors[name]).items():
            theirs = reference.about.get(key)
            if theirs != ours:
                raise ValueError(
                    f"{folder / name}.npz: {key} is {theirs!r}, but evaluation.features.{name} has {ours!r}; valid are "
                    "references of the same network and transform"
                )
    return references


def compute_references(
    extractors: Mapping[str, FeatureExtractor], batches: Batches, sample_size: int, device: torch.device
) -> dict[str, Reference]:
    """References of these images; every process reads its own. Raises ValueError for fewer than two images."""
    moments = {name: FeatureMoments() for name in extractors}
    samples = {name: FeatureSample(sample_size, stream=_STREAM) for name in extractors}
    for images, keys in batches:
        images = images.to(device)
        for name, extractor in extractors.items():
            features = extractor(images)
            moments[name].add(features)
            samples[name].add(features, keys)
    references = {}
    for name in extractors:
        together = moments[name].of_all_processes(device)
        if together.count < 2:
            raise ValueError("evaluation.features: Fréchet distance and KID need at least two images")
        references[name] = Reference(
            mean=together.mean.cpu(),
            covariance=together.covariance().cpu(),
            sample=samples[name].of_all_processes(),
            about={"num_images": together.count},
        )
    return references


def identity(extractor: FeatureExtractor) -> dict[str, str]:
    """What has to be equal for features to be comparable."""
    return {"extractor_sha256": extractor.sha256, "extractor_transform": extractor.transform}


def _sum(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
