"""The shards that `flextok latents` writes beside their index: safetensors files of consecutive samples of a split.

| tensor     | shape, type                                 | content                                            |
| ---------- | ------------------------------------------- | -------------------------------------------------- |
| `latents`  | `[samples, variants, c, h, w]`, fp32 or bf16 | what the VAE wrote, scaled as the model reads it   |
| `keys`     | `[bytes]` uint8                             | the keys of all variants, one after the other      |
| `key_ends` | `[samples * variants]` int64                | where each key ends                                |
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flextok.data.samples import ImageDataset, Index, LatentSample, epoch_and_number
from flextok.data.shard_index import ShardKind, check_shard_size, damaged
from flextok.seeding import mixed_seed

LATENTS = ShardKind(
    format="flextok latents 1",
    content="latents",
    command="flextok latents",
    otherwise="for images choose data=image_folder",
)
_READ_ERRORS = (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError)


class ShardedLatents(ImageDataset):
    """Latents of one split, read one sample at a time from files that are opened when they are first needed.

    Of several variants of a training sample each epoch takes another, starting with one that depends on the seed.

    Args:
        folder: Where the shards are.
        shards: Their entries in the index, in order.
        seed: Decides which variant of a sample comes first.

    Raises:
        ValueError: A shard is missing, or has another size than when it was written.
    """

    def __init__(self, folder: Path, shards: list[dict[str, Any]], *, num_variants: int, seed: int) -> None:
        self.folder = folder
        self.files = [str(shard["file"]) for shard in shards]
        self.ends = list(accumulate(int(shard["samples"]) for shard in shards))
        self.num_variants = num_variants
        self.seed = seed
        self._open_files: dict[str, dict[str, Tensor]] = {}
        for shard in shards:
            check_shard_size(folder, shard, LATENTS)

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
                with safe_open(self.folder / name, framework="pt") as file:
                    self._open_files[name] = {part: file.get_tensor(part) for part in ("latents", "keys", "key_ends")}
            # Mapped, not read: the slices of `safe_open` would take ten times as long.
            shard = self._open_files[name]
            latents = shard["latents"][row, variant]
            place = row * self.num_variants + variant
            start = int(shard["key_ends"][place - 1]) if place else 0
            key = shard["keys"][start : int(shard["key_ends"][place])].numpy().tobytes()
            return {"latents": latents.float(), "key": key.decode("utf-8", "surrogateescape")}
        except _READ_ERRORS as error:
            raise ValueError(damaged(self.folder / name, str(error), LATENTS)) from error


def shard_tensors(latents: Tensor, keys: list[list[str]]) -> dict[str, Tensor]:
    """The tensors of a shard: `latents` `[samples, variants, c, h, w]`, and a key for each variant of each sample."""
    texts = [key.encode("utf-8", "surrogateescape") for variants in keys for key in variants]
    return {
        "latents": latents.contiguous(),
        "keys": torch.tensor(list(b"".join(texts)), dtype=torch.uint8),
        "key_ends": torch.tensor(list(accumulate(map(len, texts))), dtype=torch.int64),
    }
