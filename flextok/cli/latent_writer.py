"""Encode a data set shard by shard. In which batches samples are encoded depends on their positions alone."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flextok.cli.shard_folder import ShardFolder
from flextok.data.latent_shards import shard_tensors
from flextok.data.samples import ImageDataset

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor, list[str], list[int]], Tensor]
"""Images `[batch, 3, height, width]`, their keys and variants to latents `[batch, c, h, w]`."""


def write_latents(
    folder: ShardFolder, split_name: str, number: int, latents: Tensor, keys: list[list[str]], *, num_skipped: int
) -> None:
    """Write a shard and enter it into the index; `latents` are `[samples, variants, c, h, w]`.

    Raises:
        ValueError: The shape is not that of the shards before.
    """
    shape = list(latents.shape[2:])
    if len(latents) and folder.index.setdefault("shape", shape) != shape:
        raise ValueError(f"the VAE made latents {shape} after {folder.index['shape']}: all must be equal")
    folder.write_shard(
        split_name,
        number,
        lambda path: save_file(shard_tensors(latents, keys), path),
        suffix=".safetensors",
        num_samples=len(latents),
        num_skipped=num_skipped,
    )


def encode_split(
    folder: ShardFolder,
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
    split, shards = folder.open_split(
        name,
        samples=len(dataset),
        fingerprint=dataset.fingerprint(),
        variants=variants,
        shard_size=shard_size,
    )
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
        encoded: dict[int, list[tuple[str, Tensor]]] = {position: [] for position in positions}
        for batch in _batches(positions, variants, batch_size):
            samples = next(loader)
            read = [(where, sample) for where, sample in zip(batch, samples, strict=True) if sample is not None]
            if read:
                images = torch.stack([sample["image"] for _, sample in read])
                keys = [sample["key"] for _, sample in read]
                latents = encode(images, keys, [variant for (_, variant), _ in read]).to("cpu", dtype)
                for ((position, _), _), key, one in zip(read, keys, latents, strict=True):
                    encoded[position].append((key, one))
            report(sum(variant == variants - 1 for _, variant in batch))
        whole = [entries for entries in encoded.values() if len(entries) == variants]
        stacked = [torch.stack([latent for _, latent in entries]) for entries in whole]
        write_latents(
            folder,
            name,
            number,
            torch.stack(stacked) if stacked else torch.empty(0, variants, 0, 0, 0, dtype=dtype),
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
