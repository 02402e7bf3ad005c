"""Who judges the reconstructions of an evaluation: networks, and what the feature extractors are to compare with."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flextok.evaluation.features import FeatureExtractor, sha256_of_module
from flextok.evaluation.images import Batches as ImageBatches
from flextok.evaluation.images import first_images
from flextok.evaluation.networks import Networks, build_networks
from flextok.evaluation.processes import of_first_process
from flextok.evaluation.references import (
    Batches,
    Reference,
    cached_references,
    identity,
    images_sum,
    imported_references,
)
from flextok.evaluation.settings import EvaluationSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Judges(Networks):
    """Networks, the references of the extractors, and the sum of the images that they are to be compared on."""

    references: Mapping[str, Reference] = field(default_factory=dict)
    images_sha256: str | None = None

    def protocol(self) -> dict[str, Any]:
        """What the networks are, and what their references were made of; or why they are missing."""
        known: dict[str, Any] = {name: {"missing": reason} for name, reason in self.missing.items()}
        for name, extractor in self.extractors.items():
            about = self.references[name].about
            known[f"features.{name}"] = {
                **identity(extractor),
                "num_features": len(self.references[name].mean),
                "references": {key: about[key] for key in ("images_sha256", "num_images", "sample_size")},
                "covariance_is_singular": about["num_images"] <= len(self.references[name].mean),
            }
        for name, distance in self.distances.items():
            known[f"distances.{name}"] = {"sha256": sha256_of_module(distance)}
        return known


NO_JUDGES = Judges()


def build_judges(
    settings: EvaluationSettings, open_batches: Callable[[], ImageBatches], device: torch.device
) -> Judges:
    """Load the networks and get their references; `open_batches` reads the evaluated images from the start.

    Raises ValueError for a network that is no such thing; one whose weights are missing is logged and noted.
    """
    networks = build_networks(settings.features, settings.distances, device)
    if not networks.extractors:
        return Judges(**vars(networks))

    def read() -> Batches:
        return first_images(open_batches(), settings.num_images)

    images_sha256 = images_sum(read())
    references = _references(networks.extractors, settings, read, images_sha256, device)
    return Judges(**vars(networks), references=references, images_sha256=images_sha256)


def _references(
    extractors: Mapping[str, FeatureExtractor],
    settings: EvaluationSettings,
    read: Callable[[], Batches],
    images_sha256: str,
    device: torch.device,
) -> dict[str, Reference]:
    if settings.import_references is not None:
        references = imported_references(extractors, Path(settings.import_references).expanduser())
    else:
        references = cached_references(
            extractors,
            read,
            images_sha256=images_sha256,
            sample_size=settings.kid_subsets * settings.kid_subset_size,
            cache=Path(settings.reference_cache).expanduser(),
            device=device,
        )
    for name, reference in references.items():
        num_images, dim = reference.about["num_images"], len(reference.mean)
        if reference.about["images_sha256"] != images_sha256:
            logger.warning("features.%s: the imported references are of other images than those evaluated", name)
        if num_images <= dim:
            logger.warning(
                "features.%s: %d images are too few for a covariance of %d features, which is singular; the Fréchet "
                "distance then depends strongly on the number of images, KID does not",
                *(name, num_images, dim),
            )
        if settings.export_references is not None:
            folder = Path(settings.export_references).expanduser()
            of_first_process(partial(reference.save, folder / f"{name}.npz"))
    return references
