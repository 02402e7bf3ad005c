"""Carries the global random states over an interruption.

The model draws from `data["rng"]`; the global generators remain for what cannot be handed one: `nn.Dropout`, and
the seeds data loaders give their workers.
"""

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from flextok.seeding import mixed_seed


class RandomStates(Callback):
    """Stores the global random states with each checkpoint and puts them back before the first resumed step.

    Torch is also reseeded from (seed, step, rank) at every step: validation in between, or a checkpoint written
    before rather than after it, then changes nothing for `nn.Dropout`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only: anything else would not load with `weights_only=True`."""
        return collect_random_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: setting up the loaders and the sanity check draw numbers too.
        if self._loaded is not None:
            restore_random_states(self._loaded)
            self._loaded = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(mixed_seed("global", self.seed, trainer.global_step, batch_idx, trainer.global_rank))


def collect_random_states() -> dict[str, Any]:
    """The states of the generators of torch, CUDA, Python and NumPy."""
    version, internal, gauss = random.getstate()
    # The global state is the point here, deprecated or not.
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo `collect_random_states`; CUDA states are left alone where the number of devices has changed."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state((name, words, int(position), int(has_gauss), cached))  # noqa: NPY002
