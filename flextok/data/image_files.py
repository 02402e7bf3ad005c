"""Which image files there are, which split each belongs to, and which of them cannot be read."""

import logging
import math
import os
from hashlib import blake2b
from pathlib import Path

import torch
from PIL import Image

from flextok.data.datamodule import Split
from flextok.data.transforms import DECODE_ERRORS, decode

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_log = logging.getLogger(__name__)


class ImageFiles:
    """The image files below a folder; those that turn out to be unreadable are counted and logged once each.

    Args:
        root: The folder.
        max_bad_fraction: Reading stops when more than this part of all files turns out to be unreadable.

    Raises:
        ValueError: The folder is missing or holds no image; or, while reading, too many files are unreadable.
    """

    def __init__(self, root: str | Path, *, max_bad_fraction: float) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {max_bad_fraction}: it must be between 0 and 1")
        self.root = Path(root).expanduser()
        self.paths = list_images(self.root)
        self.max_bad_fraction = max_bad_fraction
        # In shared memory, so that worker processes count together.
        self._is_bad = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_bad(self) -> int:
        """How many files have turned out to be unreadable so far, in this process and its workers."""
        return int(self._is_bad.sum())

    def read(self, number: int) -> Image.Image | None:
        """The image of a file in RGB, or `None` if it cannot be read.

        Raises:
            ValueError: This is one unreadable file too many.
        """
        if self._is_bad[number]:
            return None
        try:
            return decode(self.root / self.paths[number])
        except DECODE_ERRORS as error:
            self._is_bad[number] = True
            _log.warning("skipping an unreadable image: %s (%r)", self.root / self.paths[number], error)
        # Rounded up: one bad file among five must not stop a run that tolerates a tenth.
        if self.num_bad > math.ceil(self.max_bad_fraction * len(self)):
            raise ValueError(
                f"{self.num_bad} of the {len(self)} images in data.root={self.root} cannot be read, more "
                f"than data.max_bad_fraction={self.max_bad_fraction} allows; the last was {self.paths[number]}"
            )
        return None


def list_images(root: Path) -> list[str]:
    """Relative paths of all images below `root`, sorted, with forward slashes; hidden ones are left out.

    Raises:
        ValueError: There is no such folder, or no image in it.
    """
    if not root.is_dir():
        raise ValueError(f"data.root={root} is not a folder: give a folder of {', '.join(SUFFIXES)} files")
    paths = find_images(root)
    if not paths:
        raise ValueError(f"data.root={root} has no image, at any depth: looked for {', '.join(SUFFIXES)}")
    return paths


def find_images(root: Path) -> list[str]:
    """The same for a folder that may hold none."""
    paths = []
    seen = {os.path.realpath(root)}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # Data sets are often folders of links; one that leads back up must not go on forever.
        targets = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(subfolders)}
        subfolders[:] = [name for name, target in targets.items() if name[0] != "." and target not in seen]
        seen.update(targets[name] for name in subfolders)
        relative = Path(folder).relative_to(root)
        images = [name for name in files if name[0] != "." and name.lower().endswith(SUFFIXES)]
        paths += [(relative / name).as_posix() for name in images]
    return sorted(paths)


def split_files(paths: list[str], *, val_fraction: float, test_fraction: float) -> dict[Split, list[int]]:
    """Divide files by a hash of their path, so that files that come or go do not move the others.

    If all paths begin with `train/`, `val/` or `test/`, and all three occur, those folders are the splits. In
    each split files are in the order of their hashes, so that the first few are a fair sample. A folder too
    small for its fractions gives `val` and `test` one image each all the same.

    Returns:
        Positions in `paths`.

    Raises:
        ValueError: There are fewer than three files, or the fractions leave nothing for a split.
    """
    if val_fraction <= 0 or test_fraction <= 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"data.val_fraction and data.test_fraction are {val_fraction} and {test_fraction}: both must be "
            "positive, and their sum less than 1"
        )
    order = sorted(range(len(paths)), key=lambda number: (hash_fraction(paths[number]), paths[number]))
    if {path.split("/", 1)[0] for path in paths} == set(_SPLITS):
        _log.info("using the folders train, val and test as the splits")
        return {split: [n for n in order if paths[n].startswith(f"{split}/")] for split in _SPLITS}
    if len(paths) < len(_SPLITS):
        raise ValueError(f"data.root has {len(paths)} images: train, val and test need at least one each")
    fractions = [hash_fraction(path) for path in paths]
    by_hash_test = sum(f < test_fraction for f in fractions)
    by_hash_val = sum(test_fraction <= f < test_fraction + val_fraction for f in fractions)
    num_test = min(max(by_hash_test, 1), len(paths) - 2)
    num_val = min(max(by_hash_val, 1), len(paths) - num_test - 1)
    if (num_test, num_val) != (by_hash_test, by_hash_val):
        _log.warning(
            "only %d images: val has %d and test %d of them, so that no split is empty; which ones may "
            "change when images are added",
            *(len(paths), num_val, num_test),
        )
    held_out = num_test + num_val
    return {"train": order[held_out:], "val": order[num_test:held_out], "test": order[:num_test]}


def hash_fraction(path: str) -> float:
    """A number in [0, 1) that depends on the path alone and is spread evenly."""
    digest = blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    # Of the 64 bits, the 53 that a float can hold: all 64 could round to 1.
    return (int.from_bytes(digest, "big") >> 11) / 2**53
