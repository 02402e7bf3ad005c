"""Write images into shards: several processes read and resize, one writes."""

import logging
import math
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flextok.cli.image_sources import ImageSource
from flextok.cli.shard_folder import ShardFolder
from flextok.data.tar_shards import member_name
from flextok.data.transforms import DECODE_ERRORS, decode

logger = logging.getLogger(__name__)

_BATCH_SIZE = 16  # Images a process hands over at a time.


class ImageFile(NamedTuple):
    """The content of an image file, its key, and its suffix such as `.jpg`."""

    key: str
    suffix: str
    content: bytes


class ShardFormat(NamedTuple):
    """How one shard is written: `write` puts images, in their order, into a new file of this suffix."""

    suffix: str
    write: Callable[[Path, Sequence[ImageFile]], None]


def write_tar(path: Path, images: Sequence[ImageFile]) -> None:
    """Equal images give equal bytes: a new `TarInfo` has no time and no owner."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for image in images:
            member = tarfile.TarInfo(member_name(image.key, image.suffix))
            member.size = len(image.content)
            archive.addfile(member, BytesIO(image.content))


TAR = ShardFormat(".tar", write_tar)


class BadImages:
    """Counts unreadable images and stops at too many.

    Args:
        max_fraction: The part of `total` that may be unreadable.
    """

    def __init__(self, total: int, *, max_fraction: float) -> None:
        self.total = total
        self.max_fraction = max_fraction
        self.count = 0

    def add(self, count: int) -> None:
        """Raise ValueError if these are too many."""
        self.count += count
        # Rounded up: one bad file among five must not stop what tolerates a tenth.
        if self.count > math.ceil(self.max_fraction * self.total):
            raise ValueError(
                f"{self.count} of the {self.total} images of SOURCE cannot be read, more than "
                f"--max-bad-fraction={self.max_fraction} allows; the warnings name them"
            )


def fill_split(
    folder: ShardFolder,
    name: str,
    source: ImageSource,
    numbers: Sequence[int],
    shard_format: ShardFormat,
    *,
    fingerprint: str,
    shard_size: int,
    image_size: int | None,
    quality: int,
    num_workers: int,
    bad: BadImages,
    report: Callable[[int], None],
) -> None:
    """Write the shards of a split that are missing or damaged; `report` gets the number of images done, in steps.

    Args:
        numbers: The images of the split, in order.
        fingerprint: Tells these images from others.

    Raises:
        ValueError: Too many images cannot be read, or the folder holds others.
    """
    split, shards = folder.open_split(name, samples=len(numbers), fingerprint=fingerprint, shard_size=shard_size)
    bad.add(sum(entry["skipped"] for place, entry in enumerate(split["shards"]) if place not in shards))
    report(len(numbers) - sum(map(len, shards.values())))
    batches = [
        [numbers[position] for position in positions[start : start + _BATCH_SIZE]]
        for positions in shards.values()
        for start in range(0, len(positions), _BATCH_SIZE)
    ]
    loader = iter(
        DataLoader(
            _Prepared(source, image_size=image_size, quality=quality),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=list,
            # Without its own, a loader draws from torch's default generator.
            generator=torch.Generator().manual_seed(0),
        )
    )
    for number, positions in shards.items():
        images: list[ImageFile] = []
        for _ in range(0, len(positions), _BATCH_SIZE):
            done = next(loader)
            for one in done:
                if isinstance(one, ImageFile):
                    images.append(one)
                else:
                    logger.warning("leaving out an unreadable image: %s", one)
                    bad.add(1)
            report(len(done))
        _write(folder, name, number, shard_format, images, num_skipped=len(positions) - len(images))


def _write(
    folder: ShardFolder,
    split_name: str,
    number: int,
    shard_format: ShardFormat,
    images: Sequence[ImageFile],
    *,
    num_skipped: int,
) -> None:
    folder.write_shard(
        split_name,
        number,
        lambda path: shard_format.write(path, images),
        suffix=shard_format.suffix,
        num_samples=len(images),
        num_skipped=num_skipped,
    )


def prepare_image(key: str, content: bytes, *, image_size: int | None, quality: int) -> ImageFile:
    """The file as it is, or as a JPEG whose shorter side is `image_size` if it is larger and a size is given.

    Raises one of `DECODE_ERRORS` if it is no complete image.
    """
    image = decode(content)
    shorter = min(image.size)
    if image_size is None or shorter <= image_size:
        return ImageFile(key, PurePosixPath(key).suffix.lower(), content)
    width, height = (max(image_size, round(side * image_size / shorter)) for side in image.size)
    file = BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, format="JPEG", quality=quality)
    return ImageFile(key, ".jpg", file.getvalue())


class _Prepared(Dataset[Any]):
    """Images ready to be written, or what is wrong with them, in words."""

    def __init__(self, source: ImageSource, **settings: Any) -> None:
        self.source = source
        self.settings = settings

    def __getitem__(self, number: int) -> ImageFile | str:
        key = self.source.keys[number]
        try:
            return prepare_image(key, self.source.read(number), **self.settings)
        except DECODE_ERRORS as error:
            return f"{key} ({error!r})"
