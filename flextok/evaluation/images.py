"""Which images does an evaluation read? The first ones of a split, and a sum that stands for their content."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def first_images(batches: Iterable[Mapping[str, Any]], limit: int | None) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """Images `[B, 3, H, W]` and their keys, batch by batch, at most `limit` images in all."""
    left = limit
    for batch in batches:
        images, keys = batch["image"], batch["key"]
        take = len(images) if left is None else min(left, len(images))
        yield images[:take], keys[:take]
        left = None if left is None else left - take
        if left == 0:
            return


class ImageSetHash:
    """A sum over keys and pixels of images, as they are after resizing and cropping; their order does not matter."""

    def __init__(self) -> None:
        self._images: list[tuple[str, str]] = []

    def add(self, images: Tensor, keys: Sequence[str]) -> None:
        """Count `[B, 3, H, W]` images in."""
        for image, key in zip(images.detach().float().cpu().contiguous(), keys, strict=True):
            digest = hashlib.sha256(str(list(image.shape)).encode())
            digest.update(image.numpy())
            self._images.append((key, digest.hexdigest()))

    def of_all_processes(self) -> str:
        """The sum (SHA-256, hexadecimal) of the images of all processes; call it on every rank."""
        from flextok.training.distributed import of_all_ranks

        total = hashlib.sha256()
        for key, digest in sorted(image for images in of_all_ranks(self._images) for image in images):
            total.update(f"{digest} {len(key)} {key}\n".encode("utf-8", "surrogateescape"))
        return total.hexdigest()
