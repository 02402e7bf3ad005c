"""Which image files there are, and which split each belongs to."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from flextok.data.datamodule import Split
from flextok.data.image_source import ImageSource
from flextok.data.splits import SPLITS, hash_fraction, hash_of_names, split_by_hash

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_log = logging.getLogger(__name__)


class ImageFiles(ImageSource):
    """The image files below a folder; keys are their paths relative to it.

    Args:
        root: The folder.
        max_bad_fraction: Part of the files that may be unreadable.

    Raises:
        ValueError: The folder is missing or holds no image.
    """

    def __init__(self, root: str | Path, *, max_bad_fraction: float) -> None:
        self.root = Path(root).expanduser()
        self.paths = list_images(self.root)
        super().__init__(len(self.paths), where=f"data.root={self.root}", max_bad_fraction=max_bad_fraction)

    def fetch(self, number: int) -> tuple[str, Path]:
        """The path of a file, relative and whole."""
        return self.paths[number], self.root / self.paths[number]

    def fingerprint(self, numbers: Sequence[int]) -> str:
        """Depends on the paths and their order."""
        return hash_of_names(self.paths[number] for number in numbers)


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
    """Divide files by a hash of their path, as `split_by_hash` does.

    If all paths begin with `train/`, `val/` or `test/`, and all three occur, those folders are the splits.

    Returns:
        Positions in `paths`.

    Raises:
        ValueError: There are fewer than three files, or the fractions leave nothing for a split.
    """
    if {path.split("/", 1)[0] for path in paths} == set(SPLITS):
        _log.info("using the folders train, val and test as the splits")
        order = sorted(range(len(paths)), key=lambda number: (hash_fraction(paths[number]), paths[number]))
        return {split: [n for n in order if paths[n].startswith(f"{split}/")] for split in SPLITS}
    return split_by_hash(paths, {"val": val_fraction, "test": test_fraction})
