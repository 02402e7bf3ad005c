"""Random crops of photographs that come with scikit-image and scikit-learn: real images, no download.

The right quarter of each photograph is held out, its upper half as `val` and its lower half as `test`. Each
part is cut out before anything is cropped or resized, so that no filter reaches across. The pixels are
disjoint; the scenes are not, so these numbers compare settings and say little about other photographs.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flextok.data.datamodule import ImageDataModule, Split
from flextok.data.samples import ImageDataset, Index, Sample, epoch_and_number
from flextok.data.transforms import decode, to_tensor
from flextok.seeding import mixed_seed

_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
# Only what the wheels hold: for everything else these packages go to the network.
_SKIMAGE_FILES = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    *("hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
    *("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "moon.png"),
)
_FILES = {Path(file).stem: ("skimage", file) for file in _SKIMAGE_FILES} | {
    "china": ("sklearn", "china.jpg"),
    "flower": ("sklearn", "flower.jpg"),
}
_TRAIN_WIDTH = 0.75


class PhotosDataModule(ImageDataModule):
    """Square crops with a side of `min_crop` to `max_crop` pixels, resized to `image_size`.

    Args:
        names: Which photographs; see the names of the files in this module.
        train_crops_per_epoch: How many training crops count as one epoch. Every epoch has new ones.
        num_eval_crops: How many crops `val` and `test` have each; the same for every seed.
        flip: Whether half of the training crops are mirrored.
        **common: The arguments of `ImageDataModule`.

    Raises:
        ValueError: In `setup`, if a name is unknown or a held-out part cannot hold a crop.
    """

    transform = "fixed square crops of the held-out regions, resized to image_size, bicubic with antialiasing (Pillow)"

    def __init__(
        self,
        *,
        names: Sequence[str],
        min_crop: int,
        max_crop: int,
        train_crops_per_epoch: int,
        num_eval_crops: int,
        flip: bool,
        **common: int | None,
    ) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.names = tuple(names)
        self.min_crop = min_crop
        self.max_crop = max_crop
        self.train_crops_per_epoch = train_crops_per_epoch
        self.num_eval_crops = num_eval_crops
        self.flip = flip

    def make_datasets(self) -> dict[Split, ImageDataset]:
        """Decode the photographs and cut them into their three parts."""
        if not self.names:
            raise ValueError(f"data.names is empty: choose from {', '.join(sorted(_FILES))}")
        parts = {name: split_photo(load_photo(name)) for name in self.names}
        for name, part in parts.items():
            largest = min(side for image in part.values() for side in image.size)
            if not 1 <= self.min_crop <= self.max_crop <= largest:
                raise ValueError(
                    f"data.min_crop and data.max_crop are {self.min_crop} and {self.max_crop}: {name} allows "
                    f"1 <= min_crop <= max_crop <= {largest}"
                )
        for field in ("train_crops_per_epoch", "num_eval_crops"):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field} is {getattr(self, field)}: it must be at least 1")
        counts: dict[Split, int] = {
            "train": self.train_crops_per_epoch,
            "val": self.num_eval_crops,
            "test": self.num_eval_crops,
        }
        return {
            split: PhotoCrops(
                {name: part[split] for name, part in parts.items()},
                split=split,
                num_crops=num_crops,
                image_size=self.image_size,
                crop_range=(self.min_crop, self.max_crop),
                flip=self.flip and split == "train",
                # Held-out crops belong to the benchmark, not to the run.
                seed=self.seed if split == "train" else 0,
            )
            for split, num_crops in counts.items()
        }


class PhotoCrops(ImageDataset):
    """`num_crops` crops per epoch, each a function of split, seed, epoch and number; photographs take turns."""

    def __init__(
        self,
        photos: dict[str, Image.Image],
        *,
        split: Split,
        num_crops: int,
        image_size: int,
        crop_range: tuple[int, int],
        flip: bool,
        seed: int,
    ) -> None:
        self.photos = list(photos.items())
        self.split = split
        self.num_crops = num_crops
        self.image_size = image_size
        self.crop_range = crop_range
        self.flip = flip
        self.seed = seed

    def __len__(self) -> int:
        return self.num_crops

    def __getitem__(self, index: Index) -> Sample:
        epoch, number = epoch_and_number(index)
        name, photo = self.photos[number % len(self.photos)]
        generator = torch.Generator().manual_seed(mixed_seed("crop", self.split, self.seed, epoch, number))
        of_side, of_x, of_y, of_flip = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        smallest, largest = self.crop_range
        side = smallest + int(of_side * (largest - smallest + 1))
        x, y = int(of_x * (photo.width - side + 1)), int(of_y * (photo.height - side + 1))
        image = self._crop(photo, x, y, side)
        is_flipped = self.flip and of_flip < 0.5
        key = f"photos/{self.split}/{name}/{x}_{y}_{side}{'_flipped' if is_flipped else ''}"
        return {"image": image.flip(-1) if is_flipped else image, "key": key}

    def _crop(self, photo: Image.Image, x: int, y: int, side: int) -> Tensor:
        size = (self.image_size, self.image_size)
        return to_tensor(photo.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)))


def split_photo(photo: Image.Image) -> dict[Split, Image.Image]:
    """The parts of a photograph, as images of their own."""
    width, height = photo.size
    edge, middle = round(_TRAIN_WIDTH * width), height // 2
    return {
        "train": photo.crop((0, 0, edge, height)),
        "val": photo.crop((edge, 0, width, middle)),
        "test": photo.crop((edge, middle, width, height)),
    }


def load_photo(name: str) -> Image.Image:
    """A photograph in RGB, from the files of an installed package.

    Raises:
        ValueError: The name is unknown.
        ImportError: The package is not installed.
        FileNotFoundError: The package is installed without this file.
    """
    if name not in _FILES:
        raise ValueError(f"data.names has {name!r}: choose from {', '.join(sorted(_FILES))}")
    package, file = _FILES[name]
    # Found, not imported: scikit-learn takes seconds, and reading a file needs none of it.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"the photograph {name!r} comes with {package}: pip install 'flextok[data]'")
    path = Path(spec.origin).parent / _FOLDERS[package] / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the installed {package} has no {name!r}; leave it out of data.names"
        )
    return decode(path)
