"""Tokens of images as data, for models that learn to write them: what `flextok tokenize` wrote, by number."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from flextok.data.shard_index import ShardKind, check_complete, check_shard_size, damaged, read_index
from flextok.data.token_files import READ_ERRORS, TokenRow, storage_of

TOKENS = ShardKind(
    format="flextok tokens 1",
    content="tokens",
    command="flextok tokenize",
    otherwise="images are not tokens yet",
    argument="folder",
)
SPLIT = "tokens"


class TokenSample(TypedDict):
    """The ids of one image, its key, and its height and width before it was cut to a square."""

    key: str
    ids: Int64[Tensor, " length"]
    height: int
    width: int


class TokenShards(Dataset[TokenSample]):
    """The tokens in a folder, in the order of the images.

    Shards are read whole when one of their images is asked for, and only the last few are kept: reading in order, or
    mixing within `shards_in_memory` of them, reads each file once.

    Args:
        folder: What `flextok tokenize` wrote.
        shards_in_memory: How many shards are kept.

    Attributes:
        metadata: How the tokens were made: `model` (`weights_sha256`, `codebook_size`, `num_registers`, `levels`),
            `image_size`, `preprocessing`, `keep_k` (the number of ids of an image; with a `target` the largest),
            `target`, `seed`, `format`.

    Raises:
        ValueError: It holds no tokens, not all of them yet, or a shard is missing or has another size than when it
            was written.
        ImportError: The tokens are in Parquet files and pyarrow is not installed.
    """

    def __init__(self, folder: str | Path, *, shards_in_memory: int = 8) -> None:
        if shards_in_memory < 1:
            raise ValueError(f"shards_in_memory is {shards_in_memory}: it must be at least 1")
        self.folder = Path(folder).expanduser()
        self.shards_in_memory = shards_in_memory
        index = read_index(self.folder, TOKENS)
        self.metadata: dict[str, Any] = index["settings"]
        self._storage = storage_of(self.metadata["format"])
        split = index["splits"].get(SPLIT, {"samples": 1, "shard_size": 1, "shards": []})
        check_complete(split, SPLIT, self.folder, TOKENS)
        self.shards: list[dict[str, Any]] = split["shards"]
        for shard in self.shards:
            check_shard_size(self.folder, shard, TOKENS)
        self.ends = list(accumulate(int(shard["samples"]) for shard in self.shards))
        self._read: OrderedDict[int, list[TokenRow]] = OrderedDict()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> TokenSample:
        """Raises IndexError past the end, ValueError where a shard is damaged."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"image {number} of {len(self)}")
        number %= len(self)
        shard = bisect_right(self.ends, number)
        row = self._rows(shard)[number - (self.ends[shard - 1] if shard else 0)]
        return {"key": row.key, "ids": torch.from_numpy(row.ids).long(), "height": row.height, "width": row.width}

    def keys(self) -> Iterator[str]:
        """The keys of all images in their order; reads all shards, one after the other."""
        return (row.key for shard in range(len(self.shards)) for row in self._rows(shard))

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes read for themselves.
        return {**self.__dict__, "_read": OrderedDict()}

    def _rows(self, shard: int) -> list[TokenRow]:
        if shard not in self._read:
            path = self.folder / self.shards[shard]["file"]
            try:
                rows = self._storage.read(path)
            except READ_ERRORS as error:
                raise ValueError(damaged(path, str(error), TOKENS)) from error
            if len(rows) != self.shards[shard]["samples"]:
                raise ValueError(damaged(path, f"{len(rows)} images instead of those of the index", TOKENS))
            while len(self._read) >= self.shards_in_memory:
                self._read.popitem(last=False)
            self._read[shard] = rows
        self._read.move_to_end(shard)
        return self._read[shard]
