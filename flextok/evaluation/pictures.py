"""The few images of an evaluation that people look at: the first ones, and those that came out best and worst."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flextok.data.transforms import to_uint8
from flextok.evaluation.processes import joined

EXTREMES = ("best", "worst")
NUM_EXTREMES = 4

Place = tuple[int, int]
"""Number of a batch among those of all processes, and of an image in it."""


class Example(NamedTuple):
    """An image and its reconstruction, uint8 `[3, H, W]`, which sort by their PSNR."""

    psnr: float
    key: str
    original: Tensor
    reconstruction: Tensor


@dataclass(frozen=True, kw_only=True)
class PointPictures:
    """What is kept of one point: uint8 `[N, 3, H, W]` of the first images, and the best and the worst ones."""

    first: Tensor
    extremes: Mapping[str, list[Example]]


class FirstImages:
    """Keeps the first images, on the CPU and in bytes; those of another size than the very first do not fit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._images: dict[Place, Tensor] = {}

    def add(self, number: int, images: Tensor) -> None:
        """Look through a batch `[B, 3, H, W]` in [-1, 1]."""
        # Which size is the right one another process may know.
        known = sum(image.shape == images.shape[1:] for image in self._images.values())
        for index, image in enumerate(images[: self._limit - known]):
            self._images[number, index] = to_uint8(image.detach()).cpu()

    def of_all_processes(self) -> Tensor:
        """`[N, 3, H, W]` in the order in which they were read; call it on every rank."""
        found = dict(joined(self._images.items()))
        images = [found[place] for place in sorted(found)]
        return torch.stack([image for image in images if image.shape == images[0].shape][: self._limit])


class Extremes:
    """Keeps the images of highest and of lowest PSNR."""

    def __init__(self) -> None:
        self._best: list[Example] = []
        self._worst: list[Example] = []

    def add(self, images: Tensor, reconstructions: Tensor, keys: Sequence[str], psnrs: Sequence[float]) -> None:
        """Look through a batch: two times `[B, 3, H, W]` in [-1, 1]."""
        order = sorted(range(len(keys)), key=lambda index: (psnrs[index], keys[index]))
        chosen = {*order[:NUM_EXTREMES], *order[-NUM_EXTREMES:]}
        examples = [
            Example(psnrs[i], keys[i], *(to_uint8(batch[i].detach()).cpu() for batch in (images, reconstructions)))
            for i in sorted(chosen)
        ]
        self._keep(examples, examples)

    def of_all_processes(self) -> Mapping[str, list[Example]]:
        """Those of all processes as `best` and `worst`, the most extreme first; call it on every rank."""
        best, worst = joined(self._best), joined(self._worst)
        self._best, self._worst = [], []
        self._keep(best, worst)
        return {"best": self._best, "worst": self._worst}

    def _keep(self, best: Sequence[Example], worst: Sequence[Example]) -> None:
        self._best = sorted([*self._best, *best], key=lambda e: (-e.psnr, e.key))[:NUM_EXTREMES]
        self._worst = sorted([*self._worst, *worst], key=lambda e: (e.psnr, e.key))[:NUM_EXTREMES]


def as_floats(images: Tensor) -> Tensor:
    """Bytes as numbers in [-1, 1], from which `to_uint8` makes the same bytes."""
    return images.float() / 127.5 - 1
