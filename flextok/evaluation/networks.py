"""The networks that an evaluation was asked to judge with: feature extractors, and distances of two images."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from flextok.evaluation.features import FeatureExtractor, MissingWeightsError, as_extractor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Networks by name; of those in `missing`, by `features.<name>` or `distances.<name>`, why they are not here."""

    extractors: Mapping[str, FeatureExtractor] = field(default_factory=dict)
    distances: Mapping[str, nn.Module] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def distance(self, name: str, reconstructions: Tensor, images: Tensor) -> list[float]:
        """Of two times `[B, 3, H, W]` images in [-1, 1]: B numbers. Raises ValueError if the network gives others."""
        values = self.distances[name](reconstructions.float().clamp(-1, 1), images.float())
        if not isinstance(values, Tensor) or values.numel() != len(images):
            raise ValueError(f"evaluation.distances.{name} must give one number for each of {len(images)} images")
        return values.flatten().tolist()


def build_networks(features: Mapping[str, Any], distances: Mapping[str, Any], device: torch.device) -> Networks:
    """Build the configs of both groups.

    Raises ValueError for a network that is no such thing; one whose weights are missing is logged and noted.
    """
    missing: dict[str, str] = {}
    extractors = {
        name: as_extractor(built, field=f"evaluation.features.{name}")
        for name, built in _build("features", features, missing)
    }
    modules = {
        name: _as_module(built, field=f"evaluation.distances.{name}")
        for name, built in _build("distances", distances, missing)
    }
    for extractor in extractors.values():
        extractor.to(device)
    for module in modules.values():
        module.to(device)
    return Networks(extractors=extractors, distances=modules, missing=missing)


def _build(group: str, configs: Mapping[str, Any], missing: dict[str, str]) -> Iterable[tuple[str, Any]]:
    for name, config in configs.items():
        place = f"evaluation.{group}.{name}"
        try:
            yield name, instantiate(config, _convert_="all")
        except InstantiationException as error:
            if not isinstance(error.__cause__, MissingWeightsError):
                raise ValueError(f"{place}: {error.__cause__ or error}") from error
            reason = f"{error.__cause__}, or name another place: {place}.path=<path> or paths.weights=<folder>"
            missing[f"{group}.{name}"] = reason
            logger.warning("%s is left out: %s", place, reason)


def _as_module(built: Any, *, field: str) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise ValueError(f"{field} builds a {type(built).__name__}; valid: a torch module from two images to a number")
    return built.eval()
