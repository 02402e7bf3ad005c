"""Images in LitData chunks, on disk or in object storage: for data sets of any size."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from flextok.data.datamodule import ImageDataModule, Split
from flextok.data.image_source import SquareImages
from flextok.data.samples import ImageDataset
from flextok.data.streaming_cache import ChunkCache
from flextok.data.streaming_chunks import ChunkImages


class StreamingDataModule(ImageDataModule):
    """The central square of each image, resized to `image_size`; a folder of chunks for each split.

    Training reads a few chunks at a time, in an order that depends on seed and epoch, but neither on the number of
    workers nor on that of ranks. So it is resumed exactly, whatever becomes of these.

    Args:
        path: The folder above the splits, or its URL (`s3://`, `gs://`, `local:`).
        train_split: The folder of the split below `path`; so are `val_split` and `test_split`.
        cache_dir: Where chunks of a URL are kept on this machine.
        cache_gb: How many gigabytes of chunks of each split are kept there; None keeps all.
        shuffle_chunks: How many chunks are mixed with each other.
        streams: Into how many parts the chunks are dealt, each for other ranks: see `chunk_order`.
        max_bad_fraction: Part of the images that may be unreadable.
        flip: Whether half of the training images are mirrored, anew in every epoch.
        **common: The arguments of `ImageDataModule`.

    Raises:
        ValueError: In `setup`, if chunks are missing or damaged, or the cache is too small; while reading, if chunks
            are damaged or cannot be downloaded, or too many images are unreadable.
        ImportError: In `setup`, if LitData is not installed.
    """

    def __init__(
        self,
        *,
        path: str,
        train_split: str,
        val_split: str,
        test_split: str,
        cache_dir: str | None,
        cache_gb: float | None,
        shuffle_chunks: int,
        streams: int,
        max_bad_fraction: float,
        flip: bool,
        **common: int | None,
    ) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.path = path
        self.folders: dict[Split, str] = {"train": train_split, "val": val_split, "test": test_split}
        self.cache_dir = cache_dir
        self.cache_gb = cache_gb
        self.shuffle_chunks = shuffle_chunks
        self.streams = streams
        self.max_bad_fraction = max_bad_fraction
        self.flip = flip
        for name in ("shuffle_chunks", "streams"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}: it must be at least 1")

    def make_datasets(self) -> dict[Split, ImageDataset]:
        """Read the indices and check the sizes of local chunks; nothing else is read yet."""
        return {split: self._dataset(split) for split in self.folders}

    def _dataset(self, split: Split) -> ImageDataset:
        path = f"{self.path.rstrip('/')}/{self.folders[split]}"
        in_use = self.shuffle_chunks * self.streams
        source = ChunkImages(path, cache=self._cache(path), max_bad_fraction=self.max_bad_fraction, max_open=2 * in_use)
        if self.cache_gb is not None:
            needed = 2 * in_use * max(int(chunk["chunk_bytes"]) for chunk in source.chunks)
            if self.cache_gb * 1e9 < min(needed, sum(int(chunk["chunk_bytes"]) for chunk in source.chunks)):
                raise ValueError(
                    f"data.cache_gb={self.cache_gb} is too small for data.shuffle_chunks={self.shuffle_chunks} and "
                    f"data.streams={self.streams} with chunks as large as those of {path}; valid: at least "
                    f"{needed / 1e9:.3g}, or null"
                )
        return StreamedSquares(
            source,
            image_size=self.image_size,
            seed=self.seed,
            is_training=split == "train",
            flip=self.flip and split == "train",
            streams=self.streams,
            shuffle_chunks=self.shuffle_chunks,
        )

    def _cache(self, path: str) -> ChunkCache | None:
        if "://" not in path and not path.startswith("local:"):
            return None
        if self.cache_dir is None:
            raise ValueError(f"data.cache_dir is missing: chunks of {path} need a local folder to be kept in")
        max_bytes = None if self.cache_gb is None else int(self.cache_gb * 1e9)
        return ChunkCache(path, Path(self.cache_dir).expanduser(), max_bytes=max_bytes)


class StreamedSquares(SquareImages):
    """Squares of the images in chunks, shuffled so that only a few chunks are read at a time."""

    source: ChunkImages

    def __init__(self, source: ChunkImages, *, streams: int, shuffle_chunks: int, **others: Any) -> None:
        super().__init__(source, range(len(source)), **others)
        self.streams = streams
        self.shuffle_chunks = shuffle_chunks
        self.order_settings = f"data.shuffle_chunks={shuffle_chunks}, data.streams={streams} on {self.fingerprint()}"

    def order(self, generator: torch.Generator) -> Int64[Tensor, " count"]:
        """As `chunk_order` says."""
        sizes = self.source.sizes
        return chunk_order(sizes, streams=self.streams, shuffle_chunks=self.shuffle_chunks, generator=generator)


def chunk_order(
    sizes: Sequence[int], *, streams: int, shuffle_chunks: int, generator: torch.Generator
) -> Int64[Tensor, " count"]:
    """The numbers of all samples, shuffled so that neighbours come from few chunks.

    Chunks are shuffled and dealt into `streams`, which then take turns sample by sample. Ranks take turns as well, so
    with as many streams as ranks each rank reads chunks of its own. Within a stream a sample moves back by up to
    `shuffle_chunks` chunks: in their place come samples of the chunks that follow. What longer streams have left comes
    last.

    Args:
        sizes: How many samples each chunk has.
    """
    starts = list(accumulate(sizes, initial=0))
    chunks = torch.randperm(len(sizes), generator=generator).tolist()
    parts = []
    for stream in range(min(streams, len(sizes))):
        mine = chunks[stream::streams]
        numbers = torch.cat([starts[c] + torch.randperm(sizes[c], generator=generator) for c in mine])
        reach = shuffle_chunks * len(numbers) / len(mine)
        draws = torch.rand(len(numbers), generator=generator, dtype=torch.float64)
        parts.append(numbers[(torch.arange(len(numbers)) + reach * draws).argsort(stable=True)])
    shortest = min(map(len, parts))
    in_turns = torch.stack([part[:shortest] for part in parts], dim=1).flatten()
    return torch.cat([in_turns, *(part[shortest:] for part in parts)])
