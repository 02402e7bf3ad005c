"""Images of a folder of one's own: JPEG, PNG and WebP files at any depth."""

from pathlib import Path

from flextok.data.datamodule import ImageDataModule, Split
from flextok.data.image_files import ImageFiles, split_files
from flextok.data.image_source import SquareImages
from flextok.data.samples import ImageDataset


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
            split: SquareImages(
                files,
                numbers,
                image_size=self.image_size,
                seed=self.seed,
                is_training=split == "train",
                flip=self.flip and split == "train",
            )
            for split, numbers in splits.items()
        }
