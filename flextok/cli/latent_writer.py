"""Write a folder of latents, shard by shard, so that being killed costs at most one of them.

Which samples a shard holds, and in which batches they are encoded, depends on their positions alone. A shard counts
once it is in the index, and both are replaced in one step: what is there is always whole.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flextok.data.latent_shards import FORMAT, INDEX, check_shard_content, read_index, sha256_of, shard_tensors
from flextok.data.samples import ImageDataset
from flextok.utils.checkpoint import atomic_path

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor, list[str], list[int]], dict[str, Tensor]]
"""Images `[batch, 3, height, width]`, their keys and variants to what a shard stores of them: `latents`
`[batch, c, h, w]`, and maybe `features` `[batch, rows, columns, width]`."""


class LatentFolder:
    """A folder that is being filled; one process may do so at a time.

    Args:
        settings: Everything the content depends on, in plain types. A folder that exists must have the same.

    Raises:
        ValueError: The folder holds something else, or latents of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = json.loads(json.dumps(settings))
        if (path / INDEX).exists():
            self.index = read_index(path)
            _check_same(self.index["settings"], settings, path)
        elif path.exists() and (not path.is_dir() or any(file.suffix != ".tmp" for file in path.iterdir())):
            raise ValueError(f"OUT_DIR: {path} exists and holds no latents; give a new or an empty folder")
        else:
            self.index = {"format": FORMAT, "settings": settings, "shape": None, "splits": {}}
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()

    def open_split(
        self, name: str, dataset: ImageDataset, *, variants: int, shard_size: int
    ) -> tuple[dict[str, Any], list[int]]:
        """The entry of a split in the index, and the numbers of the shards that are missing or damaged.

        Raises:
            ValueError: The split was begun with another data set.
        """
        settings = {
            "samples": len(dataset),
            "fingerprint": dataset.fingerprint(),
            "variants": variants,
            "shard_size": shard_size,
        }
        split = self.index["splits"].setdefault(name, {**settings, "shards": []})
        _check_same({key: split[key] for key in settings}, settings, self.path, prefix=f"split {name}: ")
        damaged = []
        for number, shard in enumerate(split["shards"]):
            try:
                check_shard_content(self.path, shard)
            except ValueError as error:
                logger.warning("%s", error)
                damaged.append(number)
        return split, damaged + list(range(len(split["shards"]), -(-len(dataset) // shard_size)))

    def write_shard(
        self, split_name: str, number: int, content: dict[str, Tensor], keys: list[list[str]], *, num_skipped: int
    ) -> None:
        """Write a shard and enter it into the index; `content` is by name, each `[samples, variants, ...]`.

        Raises:
            ValueError: A shape is not that of the shards before.
        """
        for name, tensor in content.items():
            shape, place = list(tensor.shape[2:]), "shape" if name == "latents" else f"{name}_shape"
            if self.index.get(place) not in (None, shape):
                raise ValueError(f"{name} have the shape {shape} after {self.index[place]}: all must be equal")
            self.index[place] = shape
        file = f"{split_name}-{number:06d}.safetensors"
        with atomic_path(self.path / file) as temporary:
            save_file(shard_tensors(content, keys), temporary)
            entry = {
                "file": file,
                "samples": len(keys),
                "skipped": num_skipped,
                "bytes": temporary.stat().st_size,
                "sha256": sha256_of(temporary),
            }
        shards = self.index["splits"][split_name]["shards"]
        shards[number : number + 1] = [entry]
        with atomic_path(self.path / INDEX) as temporary:
            temporary.write_text(json.dumps(self.index, indent=1) + "\n", encoding="utf-8")


def encode_split(
    folder: LatentFolder,
    name: str,
    dataset: ImageDataset,
    encode: Encode,
    *,
    variants: int,
    shard_size: int,
    dtype: torch.dtype,
    batch_size: int,
    num_workers: int,
    report: Callable[[int], None],
) -> None:
    """Encode the shards of a split that are missing or damaged; `report` gets the number of samples done, in steps.

    A sample that cannot be read in every variant is left out.

    Raises:
        ValueError: Too many samples cannot be read, or the folder holds another data set.
    """
    split, numbers = folder.open_split(name, dataset, variants=variants, shard_size=shard_size)
    shards = {number: range(number * shard_size, min((number + 1) * shard_size, len(dataset))) for number in numbers}
    report(len(dataset) - sum(map(len, shards.values())))
    batches = [batch for positions in shards.values() for batch in _batches(positions, variants, batch_size)]
    loader = iter(
        DataLoader(
            _Variants(dataset),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=list,
            # Without its own, a loader draws from torch's default generator.
            generator=torch.Generator().manual_seed(0),
        )
    )
    for number, positions in shards.items():
        encoded: dict[int, list[tuple[str, dict[str, Tensor]]]] = {position: [] for position in positions}
        for batch in _batches(positions, variants, batch_size):
            samples = next(loader)
            read = [(where, sample) for where, sample in zip(batch, samples, strict=True) if sample is not None]
            if read:
                images = torch.stack([sample["image"] for _, sample in read])
                keys = [sample["key"] for _, sample in read]
                content = encode(images, keys, [variant for (_, variant), _ in read])
                content = {name: tensor.to("cpu", dtype) for name, tensor in content.items()}
                for row, (((position, _), _), key) in enumerate(zip(read, keys, strict=True)):
                    encoded[position].append((key, {name: tensor[row] for name, tensor in content.items()}))
            report(sum(variant == variants - 1 for _, variant in batch))
        whole = [entries for entries in encoded.values() if len(entries) == variants]
        names = list(whole[0][0][1]) if whole else []
        folder.write_shard(
            name,
            number,
            {n: torch.stack([torch.stack([one[n] for _, one in entries]) for entries in whole]) for n in names},
            [[key for key, _ in entries] for entries in whole],
            num_skipped=len(positions) - len(whole),
        )
    skipped = sum(shard["skipped"] for shard in split["shards"])
    if skipped:
        logger.warning("split %s: %d of %d images could not be read and were left out", name, skipped, len(dataset))


class _Variants(Dataset[Any]):
    """Samples by position and variant."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, where: tuple[int, int]) -> Any:
        return self.dataset.variant(*where)


def _batches(positions: Sequence[int], variants: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """All variants of all positions, in batches that do not reach beyond the shard."""
    places = [(position, variant) for position in positions for variant in range(variants)]
    return (places[start : start + batch_size] for start in range(0, len(places), batch_size))


def _check_same(stored: Any, asked: Any, folder: Path, *, prefix: str = "") -> None:
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in sorted(stored.keys() | asked.keys()):
            _check_same(stored.get(name), asked.get(name), folder, prefix=f"{prefix}{name}.")
    elif stored != asked:
        raise ValueError(
            f"OUT_DIR: {folder} holds latents made with {prefix.rstrip('.')}={stored!r}, not {asked!r}; valid: the "
            "settings it was begun with, or another folder"
        )
