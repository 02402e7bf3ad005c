"""Handwritten digits from scikit-learn's own package: 1,797 grey images of 8x8 pixels, no download.

The split is part of the benchmark: 1,285 images train, 256 choose settings (`val`), 256 are for the numbers
that are reported (`test`). It is the same for every seed.
"""

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flextok.data.datamodule import ImageDataModule, Split
from flextok.data.samples import ImageDataset, Index, Sample, epoch_and_number
from flextok.seeding import mixed_seed

_NATIVE_SIZE = 8
_SPLIT_SIZES: dict[Split, int] = {"train": 1285, "val": 256, "test": 256}


class DigitsDataModule(ImageDataModule):
    """Digits as RGB images with three equal channels, at `image_size` 8 or, enlarged, a multiple of it."""

    transform = "8 x 8 pixels enlarged to image_size, bicubic (Pillow)"

    def make_datasets(self) -> dict[Split, ImageDataset]:
        """Load and resize all images; they fit in memory many times over."""
        if self.image_size % _NATIVE_SIZE:
            raise ValueError(f"data.image_size is {self.image_size}: digits need a multiple of {_NATIVE_SIZE}")
        images = load_digit_images(self.image_size)
        generator = torch.Generator().manual_seed(mixed_seed("digits"))
        order = torch.randperm(len(images), generator=generator).tolist()
        datasets: dict[Split, ImageDataset] = {}
        start = 0
        for split, size in _SPLIT_SIZES.items():
            numbers = sorted(order[start : start + size])
            datasets[split] = Digits(images[numbers], [f"digits/{number:04d}" for number in numbers])
            start += size
        return datasets


class Digits(ImageDataset):
    """Images that are in memory already, each with its key."""

    def __init__(self, images: Float[Tensor, "count 1 height width"], keys: list[str]) -> None:
        self.images = images
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Index) -> Sample:
        _, number = epoch_and_number(index)
        return {"image": self.images[number].expand(3, -1, -1), "key": self.keys[number]}


def load_digit_images(image_size: int) -> Float[Tensor, "1797 1 height width"]:
    """All digits in the order of scikit-learn, in [-1, 1].

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits come with scikit-learn: pip install 'flextok[data]'") from error
    images = load_digits().images.astype(np.float32) / 8 - 1
    if image_size != _NATIVE_SIZE:
        size = (image_size, image_size)
        resized = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images]
        images = np.stack([np.asarray(image) for image in resized]).clip(-1, 1)
    return torch.from_numpy(images)[:, None]
