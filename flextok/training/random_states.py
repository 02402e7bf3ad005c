"""Carries the global random states over an interruption.

The model draws from `data["rng"]`; the global generators remain for what cannot be handed one: `nn.Dropout`, and
the seeds data loaders give their workers.
"""

import logging
import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from flextok.seeding import mixed_seed
from flextok.training.distributed import of_all_ranks

logger = logging.getLogger(__name__)


class RandomStates(Callback):
    """Stores the global random states of every rank with each checkpoint; the first resumed step finds them again.

    Torch is also reseeded from (seed, step, rank) at every step: validation in between, or a checkpoint written
    before rather than after it, then changes nothing for `nn.Dropout`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._loaded: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only: anything else would not load with `weights_only=True`.

        Lightning collects a checkpoint on every rank before rank 0 writes it, so the ranks can tell each other here.
        """
        return {"ranks": of_all_ranks(collect_random_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict.get("ranks", [state_dict])  # Older checkpoints hold the states of one process.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: setting up the loaders and the sanity check draw numbers too.
        if self._loaded is None:
            return
        if len(self._loaded) == trainer.world_size:
            restore_random_states(self._loaded[trainer.global_rank])
        elif trainer.is_global_zero:
            logger.warning(
                "the run was interrupted with %d processes and goes on with %d: weights, average, optimizer, schedule "
                "and order of the images go on; the size of a whole batch (data.batch_size is per process), the random "
                "numbers of each image and so the results are others than without the interruption",
                len(self._loaded),
                trainer.world_size,
            )
        self._loaded = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = mixed_seed("global", self.seed, trainer.global_step, batch_idx, trainer.global_rank)
        # Not torch.manual_seed: for every kind of device that is not in use it writes the call stack down, which takes
        # a millisecond.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)


def collect_random_states() -> dict[str, Any]:
    """The states of the generators of torch, of the CUDA device of this process, of Python and of NumPy."""
    version, internal, gauss = random.getstate()
    # The global state is the point here, deprecated or not.
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        # Not those of all devices, which belong to other ranks.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
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
    """Undo `collect_random_states`; a CUDA state is left alone where there is no such device now."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0].cpu())
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state((name, words, int(position), int(has_gauss), cached))  # noqa: NPY002
