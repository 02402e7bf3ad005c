"""Images of a folder of one's own: JPEG, PNG and WebP files at any depth."""

from hashlib import blake2b
from pathlib import Path

import torch

from flextok.data.datamodule import ImageDataModule, Split
from flextok.data.image_files import ImageFiles, split_files
from flextok.data.samples import ImageDataset, Index, Sample, epoch_and_number
from flextok.data.transforms import resize_shorter_center_crop, to_tensor
from flextok.seeding import mixed_seed


class ImageFolderDataModule(ImageDataModule):
    """The central square of each image, resized to `image_size`.

    An unreadable file is logged and left out: training takes the next readable image in its place, evaluation
    goes on without it. Keys are paths relative to `root`.

    Args:
        root: The folder. A hash of the paths decides the splits, unless they are folders `train`, `val`, `test`.
        val_fraction: Part of the images for choosing settings.
        test_fraction: Part of the images for results.
        max_bad_fraction: Part of the images that may be unreadable.
        flip: Whether half of the training images are mirrored, anew in every epoch.
        **common: The arguments of `ImageDataModule`.

    Raises:
        ValueError: In `setup`, if the folder is missing, has too few images or a fraction is impossible; while
            reading, if too many files are unreadable.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        val_fraction: float,
        test_fraction: float,
        max_bad_fraction: float,
        flip: bool,
        **common: int | None,
    ) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.root = Path(root)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.max_bad_fraction = max_bad_fraction
        self.flip = flip

    def make_datasets(self) -> dict[Split, ImageDataset]:
        """List the files and divide them; nothing is decoded yet."""
        files = ImageFiles(self.root, max_bad_fraction=self.max_bad_fraction)
        splits = split_files(files.paths, val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        return {
            split: FolderImages(
                files,
                numbers,
                image_size=self.image_size,
                seed=self.seed,
                is_training=split == "train",
                flip=self.flip and split == "train",
            )
            for split, numbers in splits.items()
        }


class FolderImages(ImageDataset):
    """The images `numbers` of `files`, with one counter of unreadable files for all splits."""

    def __init__(
        self,
        files: ImageFiles,
        numbers: list[int],
        *,
        image_size: int,
        seed: int,
        is_training: bool,
        flip: bool,
    ) -> None:
        self.files = files
        self.numbers = numbers
        self.image_size = image_size
        self.seed = seed
        self.is_training = is_training
        self.flip = flip

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Index) -> Sample | None:
        epoch, number = epoch_and_number(index)
        if not self.is_training:
            return self._sample(number)
        # A function of the files, not of what was read before: a resumed run makes the same replacement.
        for offset in range(len(self)):
            sample = self._sample((number + offset) % len(self))
            if sample is not None:
                return self._flip(sample) if self._draw(epoch, number) else sample
        raise ValueError(f"none of the {len(self)} training images in data.root={self.files.root} can be read")

    def _sample(self, number: int) -> Sample | None:
        file = self.numbers[number]
        image = self.files.read(file)
        if image is None:
            return None
        square = resize_shorter_center_crop(image, self.image_size)
        return {"image": to_tensor(square), "key": self.files.paths[file]}

    def variant(self, number: int, variant: int) -> Sample | None:
        """The image itself or mirrored: a draw by seed and key for the first variant, and in turn for the others."""
        sample = self._sample(number)
        # Two variants are never equal, as two draws might be.
        if sample is None or not self.flip or self._draw(sample["key"]) == bool(variant % 2):
            return sample
        return self._flip(sample)

    def fingerprint(self) -> str:
        """Depends on the paths of the files and their order."""
        paths = "\0".join(self.files.paths[file] for file in self.numbers)
        return blake2b(paths.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def _draw(self, *parts: int | str) -> bool:
        """Whether to mirror what these parts name."""
        if not self.flip:
            return False
        generator = torch.Generator().manual_seed(mixed_seed("flip", self.seed, *parts))
        return bool(torch.rand((), generator=generator) >= 0.5)

    @staticmethod
    def _flip(sample: Sample) -> Sample:
        return {"image": sample["image"].flip(-1), "key": sample["key"]}
