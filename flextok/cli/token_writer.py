"""Write the tokens of images shard by shard: several processes read and cut, one encodes and writes."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flextok.cli.image_sources import ImageSource
from flextok.cli.image_writer import BadImages
from flextok.cli.shard_folder import ShardFolder
from flextok.data.splits import hash_of_names
from flextok.data.token_files import TokenRow, TokenStorage
from flextok.data.token_shards import SPLIT
from flextok.data.transforms import DECODE_ERRORS, decode, resize_shorter_center_crop, to_tensor, why_unreadable

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor, list[str]], list[Tensor]]
"""Images `[batch, 3, size, size]` in [-1, 1] and their keys to the ids of each, `[length]` of any length."""


def write_tokens(
    folder: ShardFolder,
    source: ImageSource,
    encode: Encode,
    storage: TokenStorage,
    *,
    image_size: int,
    shard_size: int,
    batch_size: int,
    num_workers: int,
    bad: BadImages,
    report: Callable[[int], None],
) -> None:
    """Write the shards that are missing or damaged; `report` gets the number of images done, in steps.

    Which images are encoded together depends on their positions alone, so a shard is the same whenever it is made.

    Raises:
        ValueError: Too many images cannot be read, or the folder holds tokens of others.
    """
    total = len(source.keys)
    split, shards = folder.open_split(
        SPLIT, samples=total, fingerprint=hash_of_names(source.keys), shard_size=shard_size
    )
    bad.add(sum(entry["skipped"] for place, entry in enumerate(split["shards"]) if place not in shards))
    report(total - sum(map(len, shards.values())))
    loader = iter(
        DataLoader(
            _Squares(source, image_size=image_size),
            batch_sampler=[[*batch] for positions in shards.values() for batch in _batches(positions, batch_size)],
            num_workers=num_workers,
            collate_fn=_collate,
            # Without its own, a loader draws from torch's default generator.
            generator=torch.Generator().manual_seed(0),
        )
    )
    for number, positions in shards.items():
        rows: list[TokenRow] = []
        for batch in _batches(positions, batch_size):
            images, about, problems = next(loader)
            for problem in problems:
                logger.warning("leaving out an unreadable image: %s", problem)
                bad.add(1)
            if about:
                ids = encode(images, [key for key, _, _ in about])
                rows += [
                    TokenRow(key, tokens.to("cpu", torch.int32).numpy(), height, width)
                    for (key, height, width), tokens in zip(about, ids, strict=True)
                ]
            report(len(batch))
        _write(folder, number, storage, rows, num_skipped=len(positions) - len(rows))


def _write(
    folder: ShardFolder, number: int, storage: TokenStorage, rows: Sequence[TokenRow], *, num_skipped: int
) -> None:
    folder.write_shard(
        SPLIT,
        number,
        lambda path: storage.write(path, rows, folder.index["settings"]),
        suffix=storage.suffix,
        num_samples=len(rows),
        num_skipped=num_skipped,
    )


def _batches(positions: range, batch_size: int) -> list[range]:
    """Consecutive positions that do not reach beyond the shard."""
    return [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]


class _Square(NamedTuple):
    key: str
    image: Tensor
    height: int
    width: int


def _collate(read: Sequence[_Square | str]) -> tuple[Tensor, list[tuple[str, int, int]], list[str]]:
    """The images that could be read as one tensor, what each is, and what is wrong with the others.

    In the worker: every tensor that a process hands over costs a file handle.
    """
    squares = [one for one in read if isinstance(one, _Square)]
    images = torch.stack([one.image for one in squares]) if squares else torch.empty(0)
    about = [(one.key, one.height, one.width) for one in squares]
    return images, about, [one for one in read if isinstance(one, str)]


class _Squares(Dataset[Any]):
    """The central squares of images, or what is wrong with them, in words."""

    def __init__(self, source: ImageSource, *, image_size: int) -> None:
        self.source = source
        self.image_size = image_size

    def __getitem__(self, number: int) -> _Square | str:
        key = self.source.keys[number]
        try:
            # Neither format holds a name of other bytes.
            key.encode("utf-8")
        except UnicodeEncodeError:
            return f"{key!r} (its name is not in UTF-8)"
        try:
            image = decode(self.source.read(number))
        except DECODE_ERRORS as error:
            return f"{key} ({why_unreadable(error)})"
        square = to_tensor(resize_shorter_center_crop(image, self.image_size))
        return _Square(key, square, image.height, image.width)
