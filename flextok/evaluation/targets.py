"""A quality that reconstructions are to have: `psnr=24`, `ssim=0.9`, or a distance that a network measures."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from flextok.evaluation.networks import Networks
from flextok.evaluation.reconstruction import psnr, ssim, to_unit_range

NO_NETWORKS = Networks()


def _ssim(reconstructions: Tensor, images: Tensor) -> list[float]:
    return ssim(reconstructions, images).tolist()


# Of images in [0, 1]; more is better. Of everything that a network measures less is better.
_METRICS = {"psnr": psnr, "ssim": _ssim}


@dataclass(frozen=True)
class Target:
    """At least so much `psnr` (in dB) or `ssim`, or at most such a distance by the network of this name."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str, *, networks: Collection[str] = ()) -> "Target":
        """`psnr=24`; ValueError for what is no target. `networks` are the names of those that may measure."""
        metric, _, value = text.partition("=")
        names = (*_METRICS, *networks)
        try:
            target = cls(metric, float(value))
        except ValueError:
            target = None
        # Also false for NaN.
        if target is None or metric not in names or not abs(target.value) < float("inf"):
            raise ValueError(f"target {text!r}: valid are {', '.join(f'{name}=NUMBER' for name in names)}")
        return target

    def __str__(self) -> str:
        return f"{self.metric}={self.value!r}".removesuffix(".0")

    @property
    def needs_network(self) -> bool:
        """Whether a network measures it."""
        return self.metric not in _METRICS

    def judge(self, images: Tensor, networks: Networks = NO_NETWORKS) -> Callable[[Tensor], list[bool]]:
        """A question about reconstructions of these `[B, 3, H, W]` images in [-1, 1]: which of them are good enough?

        A network of `networks.distances` compares both images. With one of `networks.extractors` the distance is
        1 - cos(f, g) of the features f of the image and g of the reconstruction, in float64.
        """
        value = self.value
        if not self.needs_network:
            measure, truth = _METRICS[self.metric], to_unit_range(images)
            return lambda ours: [quality >= value for quality in measure(to_unit_range(ours), truth)]
        if self.metric in networks.distances:
            return lambda ours: [distance <= value for distance in networks.distance(self.metric, ours, images)]
        extractor = networks.extractors[self.metric]
        features = extractor(images)
        return lambda ours: [distance <= value for distance in cosine_distances(extractor(ours), features)]


def cosine_distances(features: Tensor, others: Tensor) -> list[float]:
    """1 - cos of the angle between each two rows of `[B, D]`: from 0 (one direction) to 2; 1 for a row of zeros."""
    # MPS has no float64.
    ours, theirs = (rows.cpu().double() for rows in (features, others))
    return (1 - F.cosine_similarity(ours, theirs, dim=1)).tolist()
