"""Numbers collected in every step and written at every logged one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from lightning import Callback, Trainer

from flextok.training.progress import is_logged

Observed = TypeVar("Observed")

STEPS_AT_ONCE = 20
"""Many small operations on one step cost more than the same ones on many steps."""


class Measurement(Callback, ABC, Generic[Observed]):
    """Collects on the device in every step; the host waits for it only where the loggers have their numbers anyway.

    Rank 0 alone does so, about its own samples. The numbers go straight to the loggers: `LightningModule.log` would
    make a tensor on the device of each of them and read it back, and repeat one that is not there this time.
    """

    def __init__(self) -> None:
        self._last_written = 0
        self._observed: list[Observed] = []

    @abstractmethod
    def observe(self, module: Any) -> Observed | None:
        """What is needed of `module.observed`, if it is there; computes nothing."""

    @abstractmethod
    def collect(self, steps: Sequence[Observed]) -> None:
        """Take in what was observed in some steps; it must not wait for the device."""

    @abstractmethod
    def take(self) -> dict[str, float]:
        """The numbers by name since the last call, and begin again."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._last_written = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not (trainer.is_global_zero and trainer.loggers):
            return
        if (observed := self.observe(pl_module)) is not None:
            self._observed.append(observed)
        step = trainer.global_step
        # Of accumulated batches only the last one makes a step.
        is_due = is_logged(trainer) and step > self._last_written
        if self._observed and (is_due or len(self._observed) >= STEPS_AT_ONCE):
            self.collect(self._observed)
            self._observed.clear()
        if is_due:
            self._last_written = step
            numbers = self.take()
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step - 1)  # Lightning counts from 0.
