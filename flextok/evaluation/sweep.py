"""Encode every image once, decode it at every `keep_k`, and keep the numbers and a few pictures."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flextok.evaluation.images import ImageSetHash, first_images
from flextok.evaluation.judges import NO_JUDGES, Judges, PointMetrics
from flextok.evaluation.settings import EvaluationSettings, resolve_keep_ks
from flextok.evaluation.tokens import token_statistics
from flextok.reconstruct import decode_latents, decode_tokens, encode_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Numbers ready for JSON, and the pictures of the first images: rows of `[N, 3, H, W]` in [-1, 1]."""

    results: list[dict[str, Any]]
    vae: dict[str, Any]
    tokens: dict[str, Any]
    num_images: int
    image_sizes: list[list[int]]
    images_sha256: str
    originals: Tensor
    vae_reconstructions: Tensor
    reconstructions: dict[int, Tensor]


@torch.no_grad()
def run_sweep(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    settings: EvaluationSettings,
    *,
    device: torch.device,
    judges: Judges = NO_JUDGES,
) -> SweepResult:
    """Evaluate `model` on batches of `{"image": [B, 3, H, W] in [-1, 1], "key": list of B names}`.

    Raises ValueError for a split without images, or other ones than those that `judges` has references of.
    """
    keep_ks = resolve_keep_ks(settings.keep_ks, model.num_registers)
    model.to(device).eval()
    decode_options = settings.decode_options()
    tables = {keep_k: PointMetrics(judges, settings) for keep_k in keep_ks}
    clocks = {keep_k: _Clock(device) for keep_k in keep_ks}
    vae_table, tokens, sizes = PointMetrics(judges, settings), [], set()
    content = ImageSetHash()
    pictures = _Pictures(settings.grid_images)

    num_images = 0
    for images, keys in first_images(batches, settings.num_images):
        content.add(images, keys)
        images = images.to(device)
        encoded = encode_images(model, images, keys, seed=settings.seed)
        tokens.append(torch.cat(encoded.tokens).cpu())
        vae_images = decode_latents(model, encoded)
        vae_table.add(images, vae_images, keys)
        pictures.add({"original": images, "vae": vae_images})
        for keep_k in keep_ks:
            with clocks[keep_k].measure(len(keys)):
                decoded = decode_tokens(model, encoded, keep_k=keep_k, seed=settings.seed, **decode_options)
            tables[keep_k].add(images, decoded, keys)
            pictures.add({keep_k: decoded})
        sizes.add(tuple(images.shape[-2:]))
        num_images += len(keys)
        logger.info("evaluated %d images", num_images)
    if num_images == 0:
        raise ValueError(f"evaluation.split={settings.split!r}: this split holds no images")
    if settings.num_images is not None and num_images < settings.num_images:
        logger.warning("asked for %d images, the split holds %d", settings.num_images, num_images)

    images_sha256 = content.of_all_processes()
    if judges.images_sha256 not in (None, images_sha256):
        raise ValueError("the images changed while they were evaluated: references were made of other ones")

    statistics = token_statistics(torch.cat(tokens), model.regularizer.codebook_size)
    return SweepResult(
        results=[
            {
                "keep_k": keep_k,
                **tables[keep_k].summary(),
                "bits_per_image": keep_k * statistics["bits_per_token"],
                "seconds_per_image": clocks[keep_k].seconds_per_image(),
            }
            for keep_k in keep_ks
        ],
        vae=vae_table.summary(),
        tokens=statistics,
        num_images=num_images,
        image_sizes=[list(size) for size in sorted(sizes)],
        images_sha256=images_sha256,
        originals=pictures["original"],
        vae_reconstructions=pictures["vae"],
        reconstructions={keep_k: pictures[keep_k] for keep_k in keep_ks},
    )


class _Clock:
    """Seconds per image; the first batch warms up and counts only where it is the only one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: list[tuple[float, int]] = []

    @contextmanager
    def measure(self, num_images: int) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self._batches.append((time.perf_counter() - start, num_images))

    def seconds_per_image(self) -> float:
        batches = self._batches[1:] or self._batches
        return sum(seconds for seconds, _ in batches) / sum(count for _, count in batches)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Pictures:
    """Keeps the first images of each row on the CPU; images of another size than the first do not fit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: dict[str | int, list[Tensor]] = {}

    def add(self, rows: Mapping[Any, Tensor]) -> None:
        for name, images in rows.items():
            kept = self._rows.setdefault(name, [])
            for image in images[: self._limit - len(kept)]:
                if not kept or image.shape == kept[0].shape:
                    kept.append(image.detach().float().cpu())

    def __getitem__(self, name: str | int) -> Tensor:
        return torch.stack(self._rows[name])
