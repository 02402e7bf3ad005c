"""Numbers collected in every step and written at every logged one."""

from abc import ABC, abstractmethod
from typing import Any

from lightning import Callback, Trainer

from flextok.training.progress import is_logged


class Measurement(Callback, ABC):
    """Collects on the device in every step; the host waits for it only where the loggers have their numbers anyway.

    Rank 0 alone does so, about its own samples. The numbers go straight to the loggers: `LightningModule.log` would
    make a tensor on the device of each of them and read it back, and repeat one that is not there this time.
    """

    def __init__(self) -> None:
        self._last_written = 0

    @abstractmethod
    def collect(self, module: Any) -> None:
        """Take in what `module.observed` holds of a step; it must not wait for the device."""

    @abstractmethod
    def take(self) -> dict[str, float]:
        """The numbers by name since the last call, and begin again."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._last_written = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not (trainer.is_global_zero and trainer.loggers):
            return
        self.collect(pl_module)
        step = trainer.global_step
        # Of accumulated batches only the last one makes a step.
        if is_logged(trainer) and step > self._last_written:
            self._last_written = step
            numbers = self.take()
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step - 1)  # Lightning counts from 0.
