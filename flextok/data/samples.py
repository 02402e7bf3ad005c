"""What a dataset gives for one image or its latents, and what a loader gives for a batch of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias, TypedDict

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

Index: TypeAlias = int | tuple[int, int]


class Sample(TypedDict):
    """One image in [-1, 1] and an id that depends on neither order, batch size nor machine."""

    image: Float[Tensor, "3 height width"]
    key: str


class Batch(TypedDict):
    """Images in [-1, 1], and one key each."""

    image: Float[Tensor, "batch 3 height width"]
    key: list[str]


class LatentSample(TypedDict):
    """The latents of one image in place of the image, scaled as the model reads them, and its id."""

    latents: Float[Tensor, "channels height width"]
    key: str


class LatentBatch(TypedDict):
    """Latents, and one key each."""

    latents: Float[Tensor, "batch channels height width"]
    key: list[str]


class ImageDataset(Dataset[Sample | LatentSample | None], ABC):
    """A map-style dataset. `None` stands for an image that cannot be read; train sets never give it.

    An index is a plain number or `(epoch, number)`; random augmentation is derived from both.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: Index) -> Sample | LatentSample | None: ...

    # What shuffling depends on besides seed and epoch. A run can only be resumed with the same.
    order_settings = ""

    def order(self, generator: torch.Generator) -> Int64[Tensor, " count"]:
        """All numbers, shuffled by the generator."""
        return torch.randperm(len(self), generator=generator)

    def variant(self, number: int, variant: int) -> Sample | LatentSample | None:
        """One of any number of augmentations of a sample, always the same; `None` if it cannot be read.

        Unlike an epoch of training, no other sample takes the place of one that cannot be read.
        """
        return self[variant, number]

    def fingerprint(self) -> str:
        """What tells this data set from one of the same settings and length, as far as that is known."""
        return ""


def collate(samples: Sequence[Sample | None]) -> Batch | None:
    """Stack samples, leaving out those that could not be read; `None` if none is left."""
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        return None
    return {
        "image": torch.stack([sample["image"] for sample in readable]),
        "key": [sample["key"] for sample in readable],
    }


def collate_latents(samples: Sequence[LatentSample]) -> LatentBatch:
    """Stack latents; there are none that cannot be read."""
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "key": [sample["key"] for sample in samples],
    }


def epoch_and_number(index: Index) -> tuple[int, int]:
    """Split an index; a plain number belongs to epoch 0."""
    return index if isinstance(index, tuple) else (0, index)
