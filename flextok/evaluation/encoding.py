"""The first pass of a sweep: all images to tokens, which every point then decodes."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flextok.attention.engine import record_backends
from flextok.evaluation.images import Batches, ImageSetHash, numbered_images
from flextok.evaluation.judges import Judges
from flextok.evaluation.pictures import FirstImages
from flextok.evaluation.point_metrics import PointMetrics, summary_row
from flextok.evaluation.processes import joined
from flextok.evaluation.settings import EvaluationSettings
from flextok.evaluation.tokens import token_statistics
from flextok.reconstruct import Encoded, decode_latents, encode_images

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """Tokens of the images of this process, and what is known of those of all processes.

    Attributes:
        batches: by the number of the batch; without latents, of which only the shape is kept.
        keys: of all images, in the order of the results, which that of reading does not change.
        sums: of their pixels; see `ImageSetHash`.
        order: where in that order each image of all processes, one process after the other, belongs.
    """

    batches: dict[int, Encoded]
    keys: list[str]
    sums: list[str]
    order: list[int]
    image_sizes: list[list[int]]
    images_sha256: str
    tokens: dict[str, Any]
    vae: dict[str, Any]
    originals: Tensor
    vae_reconstructions: Tensor
    attention_backends: set[str]

    def read_again(self, batches: Batches, device: torch.device) -> Iterator[tuple[int, Tensor, Encoded]]:
        """The same images `[B, 3, H, W]` again, with the number of their batch and their tokens, on a device.

        Raises ValueError if they are other images.
        """
        left = dict(self.batches)
        if not left:
            return
        for number, images, keys in numbered_images(batches, None):
            encoded = left.pop(number, None)
            if encoded is None or encoded.keys != list(keys[: len(encoded.keys)]):
                raise ValueError("the images changed while they were evaluated: other ones were read before")
            moved = replace(encoded, quants=[quants.to(device) for quants in encoded.quants])
            yield number, images[: len(encoded.keys)].to(device), moved
            if not left:
                return
        raise ValueError("the images changed while they were evaluated: there were more of them before")

    def in_order(self, values: Sequence[T]) -> list[T]:
        """Of something for each image of this process: that of all images, in the order of `keys`; for every rank."""
        together = joined(values)
        return [together[index] for index in self.order]


@torch.no_grad()
def encode_split(
    model: Any, batches: Batches, settings: EvaluationSettings, *, device: torch.device, judges: Judges
) -> EncodedSplit:
    """Encode all images, and compare them with what the VAE alone makes of them.

    Raises ValueError for a split without images, or other ones than those that `judges` has references of.
    """
    model.to(device).eval()
    content = ImageSetHash()
    metrics = PointMetrics(judges, settings)
    kept: dict[int, Encoded] = {}
    tokens: list[Tensor] = []
    sizes: set[tuple[int, ...]] = set()
    originals, from_vae = FirstImages(settings.grid_images), FirstImages(settings.grid_images)
    with record_backends() as backends:
        for number, images, keys in numbered_images(batches, settings.num_images):
            content.add(images, keys)
            sizes.add(tuple(images.shape[-2:]))
            images = images.to(device)
            encoded = encode_images(model, images, keys, seed=settings.seed)
            tokens.append(torch.cat(encoded.tokens).cpu())
            vae_images = decode_latents(model, encoded)
            metrics.add(images, vae_images, keys)
            originals.add(number, images)
            from_vae.add(number, vae_images)
            kept[number] = replace(
                encoded,
                tokens=[],
                quants=[quants.cpu() for quants in encoded.quants],
                latents=[latents.to("meta") for latents in encoded.latents],
            )
            logger.info("encoded %d images", sum(len(batch.keys) for batch in kept.values()))

    # One process after the other; what is made of it is in the order of keys.
    read = joined(content.images)
    if not read:
        raise ValueError(f"evaluation.split={settings.split!r}: this split holds no images")
    if settings.num_images is not None and len(read) < settings.num_images:
        logger.warning("asked for %d images, the split holds %d", settings.num_images, len(read))
    images_sha256 = content.of_all_processes()
    if judges.images_sha256 not in (None, images_sha256):
        raise ValueError("the images changed while they were evaluated: references were made of other ones")

    order = sorted(range(len(read)), key=read.__getitem__)
    return EncodedSplit(
        batches=kept,
        keys=[read[index][0] for index in order],
        sums=[read[index][1] for index in order],
        order=order,
        image_sizes=[list(size) for size in sorted(set(joined(sizes)))],
        images_sha256=images_sha256,
        tokens=token_statistics(torch.cat(joined(tokens)), model.regularizer.codebook_size),
        vae=summary_row({name: joined(v) for name, v in metrics.per_image.items()}, metrics.of_sets(), judges),
        originals=originals.of_all_processes(),
        vae_reconstructions=from_vae.of_all_processes(),
        attention_backends=set(joined(set(backends))),
    )
