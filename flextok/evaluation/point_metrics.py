"""All metrics of one set of reconstructions, and the row of numbers that is made of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok.evaluation.distribution import FeatureMoments, FeatureSample, frechet_distance, kernel_distance
from flextok.evaluation.judges import Judges
from flextok.evaluation.reconstruction import METRICS, image_metrics, summarize
from flextok.evaluation.settings import EvaluationSettings


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
        for name in self._judges.distances:
            self.per_image[name] += self._judges.distance(name, reconstructions, images)
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


def _columns(place: str) -> tuple[str, ...]:
    group, _, name = place.partition(".")
    return (f"fid_{name}", f"kid_{name}", f"kid_{name}_se") if group == "features" else (name, f"{name}_se")
