"""The one policy for random numbers.

- A training step draws from a generator seeded by (seed, optimizer step, micro-batch, rank).
- Anything judged (validation, pictures, evaluation) draws from one generator per image, seeded by (seed, image
  key, use); see `flextok.seeding` and `flextok.reconstruct`.

Nothing else about the past matters, so a resumed run draws what the uninterrupted one would have drawn, and
neither the batch size nor the order of the images changes what an image meets. Both are handed to the model under
`data["rng"]`.

All of them live on the CPU. So `keep_k` and other draws that Python has to see need not wait for the device, and a
seed means the same numbers on every device. The price: the noise of a step is drawn by the CPU and copied.
"""

import torch

from flextok.seeding import mixed_seed


def training_generator(seed: int, *, step: int, micro_batch: int, rank: int) -> torch.Generator:
    """The generator of one forward of training; `micro_batch` counts within an accumulated step."""
    return torch.Generator().manual_seed(mixed_seed("train", seed, step, micro_batch, rank))
