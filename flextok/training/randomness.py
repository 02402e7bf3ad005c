"""The one policy for random numbers.

- A training step draws from a generator seeded by (seed, optimizer step, micro-batch, rank).
- Anything judged (validation, pictures, evaluation) draws from one generator per image, seeded by (seed, image
  key).

Nothing else about the past matters, so a resumed run draws what the uninterrupted one would have drawn, and
neither the batch size nor the order of the images changes what an image meets. Both are handed to the model under
`data["rng"]`.
"""

from collections.abc import Iterable

import torch

from flextok.seeding import image_generator, mixed_seed


def training_generator(
    seed: int, *, step: int, micro_batch: int, rank: int, device: torch.device | str
) -> torch.Generator:
    """The generator of one forward of training; `micro_batch` counts within an accumulated step."""
    return torch.Generator(device).manual_seed(mixed_seed("train", seed, step, micro_batch, rank))


def image_generators(seed: int, keys: Iterable[str], *, stream: str) -> list[torch.Generator]:
    """One CPU generator per image: the same numbers on every device, independent between streams."""
    return [image_generator(seed, key, stream=stream) for key in keys]
