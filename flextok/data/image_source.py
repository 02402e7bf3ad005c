"""Encoded images from anywhere as a data set: decoded, cut to squares, mirrored; what cannot be read is counted."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from PIL import Image

from flextok.data.flips import RandomFlips, mirrored
from flextok.data.samples import ImageDataset, Index, Sample, epoch_and_number
from flextok.data.transforms import DECODE_ERRORS, Encoded, decode, resize_shorter_center_crop, to_tensor

_log = logging.getLogger(__name__)


class ImageSource(ABC):
    """Encoded images by number; those that turn out to be unreadable are counted and logged once each.

    Args:
        num_images: How many there are.
        where: What the user called them, for messages: `data.root=...`.
        max_bad_fraction: Reading stops when more than this part of all images turns out to be unreadable.

    Raises:
        ValueError: The fraction is impossible.
    """

    def __init__(self, num_images: int, *, where: str, max_bad_fraction: float) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {max_bad_fraction}: it must be between 0 and 1")
        self.where = where
        self.max_bad_fraction = max_bad_fraction
        # In shared memory, so that worker processes count together.
        self._is_bad = torch.zeros(num_images, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._is_bad)

    @abstractmethod
    def fetch(self, number: int) -> tuple[str, Encoded]:
        """The key of an image and where it can be decoded from. Its errors stop the run."""

    @abstractmethod
    def fingerprint(self, numbers: Sequence[int]) -> str:
        """What tells these images from others, as far as that is known without reading them."""

    @property
    def num_bad(self) -> int:
        """How many images have turned out to be unreadable so far, in this process and its workers."""
        return int(self._is_bad.sum())

    def read(self, number: int) -> tuple[str, Image.Image] | None:
        """The key of an image and the image in RGB, or `None` if it cannot be read.

        Raises:
            ValueError: This is one unreadable image too many.
        """
        if self._is_bad[number]:
            return None
        key, encoded = self.fetch(number)
        try:
            return key, decode(encoded)
        except DECODE_ERRORS as error:
            self._is_bad[number] = True
            _log.warning("skipping an unreadable image: %s in %s (%r)", key, self.where, error)
        # Rounded up: one bad image among five must not stop a run that tolerates a tenth.
        if self.num_bad > math.ceil(self.max_bad_fraction * len(self)):
            raise ValueError(
                f"{self.num_bad} of the {len(self)} images in {self.where} cannot be read, more "
                f"than data.max_bad_fraction={self.max_bad_fraction} allows; the last was {key}"
            )
        return None


class SquareImages(ImageDataset):
    """The central squares of the images `numbers` of `source`.

    Training takes the next readable image in the place of one that cannot be read; evaluation goes on without it.

    Args:
        flip: Whether half of the images are mirrored, as seed, epoch and number say.
    """

    def __init__(
        self,
        source: ImageSource,
        numbers: Sequence[int],
        *,
        image_size: int,
        seed: int,
        is_training: bool,
        flip: bool,
    ) -> None:
        self.source = source
        self.numbers = numbers
        self.image_size = image_size
        self.is_training = is_training
        self.flips = RandomFlips(flip, seed)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Index) -> Sample | None:
        epoch, number = epoch_and_number(index)
        if not self.is_training:
            return self._sample(number)
        # A function of the images, not of what was read before: a resumed run makes the same replacement.
        for offset in range(len(self)):
            sample = self._sample((number + offset) % len(self))
            if sample is not None:
                return mirrored(sample) if self.flips.draw(epoch, number) else sample
        raise ValueError(f"none of the {len(self)} training images in {self.source.where} can be read")

    def _sample(self, number: int) -> Sample | None:
        read = self.source.read(self.numbers[number])
        if read is None:
            return None
        key, image = read
        return {"image": to_tensor(resize_shorter_center_crop(image, self.image_size)), "key": key}

    def variant(self, number: int, variant: int) -> Sample | None:
        """The image itself or mirrored: a draw by seed and key for the first variant, and in turn for the others."""
        return self.flips.variant(self._sample(number), variant)

    def fingerprint(self) -> str:
        """Depends on which images there are, and on their order."""
        return self.source.fingerprint(self.numbers)
