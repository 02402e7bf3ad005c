"""The folder of latents that `flextok latents` writes: an index, and shards of samples.

`index.json` holds the settings the latents were made with and, per split, its shards with their checksums. A shard
is a safetensors file that holds consecutive samples of a split:

| tensor     | shape, type                                        | content                                          |
| ---------- | -------------------------------------------------- | ------------------------------------------------ |
| `latents`  | `[samples, variants, c, h, w]`, fp32 or bf16       | what the VAE wrote, scaled as the model reads it |
| `features` | `[samples, variants, rows, columns, width]`, equal | what a teacher makes of the patches, if asked    |
| `keys`     | `[bytes]` uint8                                    | the keys of all variants, one after the other    |
| `key_ends` | `[samples * variants]` int64                       | where each key ends                              |
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flextok.data.samples import ImageDataset, Index, LatentSample, epoch_and_number
from flextok.seeding import mixed_seed

INDEX = "index.json"
FORMAT = "flextok latents 1"
_READ_ERRORS = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)


class ShardedLatents(ImageDataset):
    """Latents of one split, read one sample at a time from files that are opened when they are first needed.

    Of several variants of a training sample each epoch takes another, starting with one that depends on the seed.

    Args:
        folder: Where the shards are.
        shards: Their entries in the index, in order.
        seed: Decides which variant of a sample comes first.
        features: Whether samples come with the features of the teacher, in the type they are stored in.

    Raises:
        ValueError: A shard is missing, or has another size than when it was written.
    """

    def __init__(
        self, folder: Path, shards: list[dict[str, Any]], *, num_variants: int, seed: int, features: bool
    ) -> None:
        self.folder = folder
        self.features = features
        self.files = [str(shard["file"]) for shard in shards]
        self.ends = list(accumulate(int(shard["samples"]) for shard in shards))
        self.num_variants = num_variants
        self.seed = seed
        self._open_files: dict[str, Any] = {}
        for shard in shards:
            check_shard_size(folder, shard)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Index) -> LatentSample:
        epoch, number = epoch_and_number(index)
        first = mixed_seed("variant", self.seed, number) if self.num_variants > 1 else 0
        shard = bisect_right(self.ends, number)
        row = number - (self.ends[shard - 1] if shard else 0)
        return self._read(self.files[shard], row, (first + epoch) % self.num_variants)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes.
        return {**self.__dict__, "_open_files": {}}

    def _read(self, name: str, row: int, variant: int) -> LatentSample:
        try:
            if name not in self._open_files:
                self._open_files[name] = safe_open(self.folder / name, framework="pt")
            file = self._open_files[name]
            names = ("latents", "features") if self.features else ("latents",)
            tensors = {n: file.get_slice(n)[row : row + 1, variant : variant + 1][0, 0] for n in names}
            place = row * self.num_variants + variant
            ends = file.get_slice("key_ends")[max(0, place - 1) : place + 1].tolist()
            start = ends[0] if place else 0
            key = bytes(file.get_slice("keys")[start : ends[-1]].tolist())
            tensors["latents"] = tensors["latents"].float()
            return {"key": key.decode("utf-8", "surrogateescape"), **tensors}  # type: ignore[typeddict-item]
        except _READ_ERRORS as error:
            raise ValueError(_damaged(self.folder / name, str(error))) from error


def shard_tensors(content: Mapping[str, Tensor], keys: list[list[str]]) -> dict[str, Tensor]:
    """The tensors of a shard: `latents` and what else is `[samples, variants, ...]`, and a key for each variant."""
    texts = [key.encode("utf-8", "surrogateescape") for variants in keys for key in variants]
    return {
        **{name: tensor.contiguous() for name, tensor in content.items()},
        "keys": torch.tensor(list(b"".join(texts)), dtype=torch.uint8),
        "key_ends": torch.tensor(list(accumulate(map(len, texts))), dtype=torch.int64),
    }


def read_index(folder: Path) -> dict[str, Any]:
    """The content of `index.json`.

    Raises:
        ValueError: The folder is missing, holds no latents, or its index is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"data.root={str(folder)!r} is no folder of latents: it has no {INDEX}; valid: a folder that "
            "`flextok latents` wrote (for images choose data=image_folder)"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make the latents again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path} is not of the format {FORMAT!r}; make the latents again")
    return index


def check_complete(split: Mapping[str, Any], name: str, folder: Path) -> None:
    """Raise ValueError where the shards of a split are not all there yet."""
    done = len(split["shards"])
    expected = -(-split["samples"] // split["shard_size"])
    if done < expected:
        raise ValueError(
            f"data.root={str(folder)!r}: split {name} has {done} of {expected} shards; run `flextok latents` again "
            "with the same arguments, it goes on where it stopped"
        )


def check_shard_size(folder: Path, shard: Mapping[str, Any]) -> None:
    """Raise ValueError where a shard is missing or does not have the size it was written with; reads nothing."""
    path = folder / shard["file"]
    if not path.is_file():
        raise ValueError(_damaged(path, "the file is missing"))
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(_damaged(path, f"{path.stat().st_size} bytes, written were {shard['bytes']}"))


def check_shard_content(folder: Path, shard: Mapping[str, Any]) -> None:
    """Raise ValueError where a shard is not, byte by byte, what was written; reads all of it."""
    check_shard_size(folder, shard)
    if sha256_of(folder / shard["file"]) != shard["sha256"]:
        raise ValueError(_damaged(folder / shard["file"], "its checksum is wrong"))


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> str:
    return f"{path} is damaged: {what}; run `flextok latents` again with the same arguments, it makes this shard anew"
