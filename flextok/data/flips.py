"""Which images are mirrored: a function of the seed and of names, so that a resumed run mirrors the same ones."""

from typing import NamedTuple

import torch

from flextok.data.samples import Sample
from flextok.seeding import mixed_seed


class RandomFlips(NamedTuple):
    """Mirrors one image in two, or none."""

    is_on: bool
    seed: int

    def draw(self, *parts: int | str) -> bool:
        """Whether to mirror what these parts name."""
        if not self.is_on:
            return False
        generator = torch.Generator().manual_seed(mixed_seed("flip", self.seed, *parts))
        return bool(torch.rand((), generator=generator) >= 0.5)

    def variant(self, sample: Sample | None, variant: int) -> Sample | None:
        """The image itself or mirrored: a draw by its key for the first variant, and in turn for the others."""
        # Two variants are never equal, as two draws might be.
        if sample is None or not self.is_on or self.draw(sample["key"]) == bool(variant % 2):
            return sample
        return mirrored(sample)


def mirrored(sample: Sample) -> Sample:
    """The mirror image, under the same key."""
    return {"image": sample["image"].flip(-1), "key": sample["key"]}
