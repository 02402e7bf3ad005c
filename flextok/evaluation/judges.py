"""The networks that an evaluation was asked to judge with, and all metrics of one set of reconstructions."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from flextok.evaluation.distribution import FeatureMoments, FeatureSample, frechet_distance, kernel_distance
from flextok.evaluation.features import FeatureExtractor, MissingWeightsError, as_extractor, sha256_of_module
from flextok.evaluation.images import Batches as ImageBatches
from flextok.evaluation.images import first_images
from flextok.evaluation.processes import of_first_process
from flextok.evaluation.reconstruction import METRICS, image_metrics, summarize
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
class Judges:
    """Networks by name; of those in `missing` the reason why they are not here."""

    extractors: Mapping[str, FeatureExtractor] = field(default_factory=dict)
    references: Mapping[str, Reference] = field(default_factory=dict)
    distances: Mapping[str, nn.Module] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
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
    missing: dict[str, str] = {}
    extractors = {
        name: as_extractor(built, field=f"evaluation.features.{name}")
        for name, built in _build("features", settings.features, missing)
    }
    distances = {
        name: _as_module(built, field=f"evaluation.distances.{name}")
        for name, built in _build("distances", settings.distances, missing)
    }
    for extractor in extractors.values():
        extractor.to(device)
    for distance in distances.values():
        distance.to(device)
    if not extractors:
        return Judges(distances=distances, missing=missing)

    def read() -> Batches:
        return first_images(open_batches(), settings.num_images)

    images_sha256 = images_sum(read())
    references = _references(extractors, settings, read, images_sha256, device)
    return Judges(
        extractors=extractors, references=references, distances=distances, missing=missing, images_sha256=images_sha256
    )


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


class PointMetrics:
    """All metrics of one set of reconstructions, such as those of one `keep_k`.

    Attributes:
        per_image: for each metric the numbers of this process' images, NaN for an image that is too small for it.
    """

    def __init__(self, judges: Judges, settings: EvaluationSettings) -> None:
        self._judges = judges
        self._subset_size = settings.kid_subset_size
        self._device = torch.device("cpu")
        self.per_image: dict[str, list[float]] = {name: [] for name in (*METRICS, *judges.distances)}
        self._moments = {name: FeatureMoments() for name in judges.extractors}
        size = settings.kid_subsets * settings.kid_subset_size
        self._samples = {name: FeatureSample(size, stream=("kid", settings.seed)) for name in judges.extractors}

    @torch.no_grad()
    def add(self, images: Tensor, reconstructions: Tensor, keys: Sequence[str]) -> None:
        """Compare `[B, 3, H, W]` reconstructions with the images in [-1, 1] that have these keys."""
        self._device = images.device
        for name, numbers in image_metrics(reconstructions, images).items():
            self.per_image[name] += [math.nan] * len(images) if numbers is None else numbers
        for name, distance in self._judges.distances.items():
            values = distance(reconstructions.float().clamp(-1, 1), images.float())
            if not isinstance(values, Tensor) or values.numel() != len(images):
                raise ValueError(f"evaluation.distances.{name} must give one number for each of {len(images)} images")
            self.per_image[name] += values.flatten().tolist()
        for name, extractor in self._judges.extractors.items():
            features = extractor(reconstructions)
            self._moments[name].add(features)
            self._samples[name].add(features, keys)

    def of_sets(self) -> dict[str, float | None]:
        """Distances of sets, those of all processes together: call it on every rank."""
        row: dict[str, float | None] = {}
        for name in self._judges.extractors:
            row |= self._of_set(name)
        return row

    def _of_set(self, name: str) -> dict[str, float | None]:
        reference = self._judges.references[name]
        moments = self._moments[name].of_all_processes(self._device)
        sample = self._samples[name].of_all_processes()
        if moments.count < 2:
            raise ValueError(f"evaluation.features.{name}: {moments.count} images; distances of sets need at least two")
        fid = frechet_distance(moments.mean, moments.covariance(), reference.mean, reference.covariance)
        kid, error = kernel_distance(sample, reference.sample, subset_size=self._subset_size)
        return {f"fid_{name}": fid, f"kid_{name}": kid, f"kid_{name}_se": error}


def summary_row(
    per_image: Mapping[str, Sequence[float]], of_sets: Mapping[str, float | None], judges: Judges
) -> dict[str, Any]:
    """One row of numbers by name; those that are missing are None, and `missing` says why."""
    row: dict[str, Any] = {**summarize(per_image), **of_sets}
    reasons = []
    for place, reason in judges.missing.items():
        columns = _columns(place)
        row |= dict.fromkeys(columns)
        reasons.append(f"{', '.join(columns)}: {reason}")
    return row | ({"missing": "; ".join(reasons)} if reasons else {})


def _build(group: str, configs: Mapping[str, Any], missing: dict[str, str]) -> Iterable[tuple[str, Any]]:
    for name, config in configs.items():
        try:
            yield name, instantiate(config, _convert_="all")
        except InstantiationException as error:
            if isinstance(error.__cause__, MissingWeightsError):
                missing[f"{group}.{name}"] = str(error.__cause__)
                logger.warning("evaluation.%s.%s is left out: %s", group, name, error.__cause__)
            else:
                raise ValueError(f"evaluation.{group}.{name}: {error.__cause__ or error}") from error


def _as_module(built: Any, *, field: str) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise ValueError(f"{field} builds a {type(built).__name__}; valid: a torch module from two images to a number")
    return built.eval()


def _columns(place: str) -> tuple[str, ...]:
    group, _, name = place.partition(".")
    return (f"fid_{name}", f"kid_{name}", f"kid_{name}_se") if group == "features" else (name, f"{name}_se")
