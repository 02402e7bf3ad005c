"""How a person sees that training moves: a bar on a terminal, log lines elsewhere; and how fast it moves."""

import logging
import sys
from importlib.util import find_spec
from time import perf_counter
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

logger = logging.getLogger(__name__)


def progress() -> Callback:
    """A progress bar on a terminal where rich is installed, else a line every `log_every_n_steps` steps."""
    return RichProgressBar() if sys.stdout.isatty() and find_spec("rich") else ProgressLines()


class ProgressLines(Callback):
    """Logs step and loss at every logged step, and the results of each validation."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and is_logged(trainer):
            logger.info("step %d/%d: %s", trainer.global_step, trainer.max_steps, _format(trainer, "train/"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            logger.info("validation at step %d: %s", trainer.global_step, _format(trainer, "val/"))


class TrainingPace(Callback):
    """Logs `train/images_per_second` over all ranks and `train/steps_per_second`.

    They are taken from one logged step to the next: over such a stretch the clock of the host is right for a
    GPU too, without waiting for it.
    """

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = None  # The stretch would count the time of validation.

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> None:
        now, step = perf_counter(), trainer.global_step
        if self._start is None:
            self._start = (now, step)
        elif is_logged(trainer) and step > self._start[1]:
            steps_per_second = (step - self._start[1]) / (now - self._start[0])
            images = len(batch["key"]) * trainer.accumulate_grad_batches * trainer.world_size
            pl_module.log("train/steps_per_second", steps_per_second)
            pl_module.log("train/images_per_second", steps_per_second * images)
            self._start = (now, step)


def is_logged(trainer: Trainer) -> bool:
    """Whether the loggers get the metrics of the step that has just ended."""
    return trainer.global_step % log_interval(trainer) == 0


def log_interval(trainer: Trainer) -> int:
    """`trainer.log_every_n_steps`."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it elsewhere.
    return interval


def _format(trainer: Trainer, prefix: str) -> str:
    metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
    return ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
