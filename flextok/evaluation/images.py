"""Which images does an evaluation read? The first ones of a split, and a sum that stands for their content."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor

from flextok.data.samplers import rank_and_world_size

Batches = Iterable[Mapping[str, Any] | None]
"""`{"image": [B, 3, H, W] in [-1, 1], "key": B names}`, or None where nothing of a batch could be read."""


def first_images(batches: Batches, limit: int | None) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """Images `[B, 3, H, W]` and their keys, batch by batch, at most `limit` images of all processes."""
    return ((images, keys) for _, images, keys in numbered_images(batches, limit))


def numbered_images(batches: Batches, limit: int | None) -> Iterator[tuple[int, Tensor, Sequence[str]]]:
    """As `first_images`, with the number of the batch among those of all processes, which take turns.

    With a limit the processes tell each other how much could be read: all of them have to go to the end.
    """
    from flextok.training.distributed import of_all_ranks

    rank, world_size = rank_and_world_size()
    end: Any = object()
    source, seen = iter(batches), 0
    for number in count(rank, world_size):
        batch: Any = next(source, end)
        mine = (0 if batch is None or batch is end else len(batch["key"]), batch is end)
        # Without a limit nobody needs to know of the others.
        turns = [mine] if limit is None else of_all_ranks(mine)
        take = mine[0]
        if limit is not None:
            before = seen + sum(size for size, _ in turns[:rank])
            take = max(0, min(take, limit - before))
        if take:
            yield number, batch["image"][:take], batch["key"][:take]
        seen += sum(size for size, _ in turns)
        if all(ended for _, ended in turns) or (limit is not None and seen >= limit):
            return


class ImageSetHash:
    """A sum over keys and pixels of images, as they are after resizing and cropping; their order does not matter."""

    def __init__(self) -> None:
        # Key, and the sum of size and pixels, of each image of this process.
        self.images: list[tuple[str, str]] = []

    def add(self, images: Tensor, keys: Sequence[str]) -> None:
        """Count `[B, 3, H, W]` images in."""
        for image, key in zip(images.detach().float().cpu().contiguous(), keys, strict=True):
            digest = hashlib.sha256(str(list(image.shape)).encode())
            digest.update(image.numpy())
            self.images.append((key, digest.hexdigest()))

    def of_all_processes(self) -> str:
        """The sum (SHA-256, hexadecimal) of the images of all processes; call it on every rank."""
        from flextok.training.distributed import of_all_ranks

        total = hashlib.sha256()
        for key, digest in sorted(image for images in of_all_ranks(self.images) for image in images):
            total.update(f"{digest} {len(key)} {key}\n".encode("utf-8", "surrogateescape"))
        return total.hexdigest()
