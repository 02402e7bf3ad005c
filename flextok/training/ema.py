"""Exponential moving average of the weights: judged in validation, kept apart from the trained weights."""

import logging
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from flextok.training.progress import is_logged
from flextok.training.shards import part_of, sharded_like

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "ema"


class ExponentialMovingAverage(Callback):
    """Keeps shadow copies of the trainable parameters and puts them in place for validation and test.

    The copies are float32 whatever the parameters are: steps of a thousandth would be lost in bfloat16.

    Checkpoints hold the raw weights under `state_dict`, as without this callback, and the averages under
    `ema`. Lightning's own `EMAWeightAveraging` swaps the two, copies frozen networks as well, and a run resumed
    without it continues from the averages without a word.
    """

    def __init__(self, *, decay: float, warmup: bool) -> None:
        """`warmup`: update n uses `(1 + n) / (10 + n)` while below `decay`, to forget the random start."""
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.shadow: dict[str, Tensor] = {}
        self._trained: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._raw: dict[str, Tensor] | None = None
        self._last_step = 0

    def current_decay(self) -> float:
        """The decay of the next update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = trainable(pl_module)
        if self.shadow:
            _check_same_parameters(self.shadow, parameters)
            self.shadow = {name: sharded_like(self.shadow[name], p).float() for name, p in parameters.items()}
        else:
            self.shadow = {name: p.to(torch.float32, copy=True) for name, p in parameters.items()}
        # Going through all modules in every step takes longer than averaging.
        self._trained, self._averages = list(parameters.values()), [self.shadow[name] for name in parameters]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._last_step and is_logged(trainer):
            pl_module.log("train/ema_decay", self.current_decay())
        self._catch_up(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_average(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_raw_back(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_average(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_raw_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_raw_back(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A callback that stops the run at this very step may come before this one.
        self._catch_up(trainer, pl_module)
        if self._raw is not None:
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._raw}
        checkpoint[CHECKPOINT_KEY] = {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "weights": dict(self.shadow),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint.get(CHECKPOINT_KEY)
        if stored is None:
            logger.warning("the checkpoint has no EMA: averaging starts from its raw weights")
            return
        if stored["decay"] != self.decay:
            logger.warning("callbacks.ema.decay changes from %s to %s", stored["decay"], self.decay)
        self.num_updates = stored["num_updates"]
        self.shadow = stored["weights"]

    @torch.no_grad()
    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.shadow or trainer.global_step == self._last_step or self._raw is not None:
            return  # Nothing to average yet, or only a gradient was accumulated.
        self._last_step = trainer.global_step
        weight = 1 - self.current_decay()
        torch._foreach_lerp_(self._averages, [p.float() for p in self._trained], weight)
        self.num_updates += 1

    @torch.no_grad()
    def _put_average(self, pl_module: LightningModule) -> None:
        if not self.shadow or self._raw is not None:
            return
        parameters = trainable(pl_module)
        # Validation runs in inference mode; after an exception these copies are written back outside of it.
        with torch.inference_mode(False):
            self._raw = _copies(parameters)
        _overwrite(parameters, self.shadow)

    @torch.no_grad()
    def _put_raw_back(self, pl_module: LightningModule) -> None:
        if self._raw is not None:
            _overwrite(trainable(pl_module), self._raw)
            self._raw = None


def trainable(module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name; detached, for no history may grow on them here."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in parameters.items()}


def _overwrite(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    # In place: compiled graphs and DDP hold on to the tensors themselves.
    torch._foreach_copy_([part_of(p) for p in parameters.values()], [part_of(values[name]) for name in parameters])


def _check_same_parameters(stored: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    if different := sorted(stored.keys() ^ parameters.keys()):
        raise ValueError(
            f"the EMA of the checkpoint averages other parameters than are trained now: {len(different)} "
            f"differ, such as {different[0]}; freeze the same parts, or switch it off with callbacks.ema=null"
        )
