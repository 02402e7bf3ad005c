"""How a person sees that training moves: a bar on a terminal, log lines elsewhere."""

import logging
import sys
from importlib.util import find_spec
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


def is_logged(trainer: Trainer) -> bool:
    """Whether the loggers get the metrics of the step that has just ended."""
    return trainer.global_step % _log_interval(trainer) == 0


def will_be_logged(trainer: Trainer) -> bool:
    """Whether the metrics of the step under way are wanted: by the loggers, or as the last ones of a run."""
    step = trainer.global_step + 1
    return step % _log_interval(trainer) == 0 or step == trainer.max_steps


def _log_interval(trainer: Trainer) -> int:
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it elsewhere.
    return interval


def _format(trainer: Trainer, prefix: str) -> str:
    metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
    return ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
