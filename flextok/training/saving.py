"""When checkpoints are written: regularly, after the last step, and when a run is interrupted."""

import logging
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


class RegularCheckpoint(Checkpoint):
    """Writes `last.ckpt` every n steps, after the final step and on an exception, SIGTERM or Ctrl-C.

    Continuing from any of them gives the numbers of a run that was never interrupted. An exception strikes in
    the middle of a step, when the data loader has moved on but the weights have not: what is written then is the
    position of the last completed step. (Lightning's `OnExceptionCheckpoint` writes the position it finds and
    loses a batch.)
    """

    def __init__(self, *, folder: str, every_n_steps: int, keep_every_n_steps: int | None) -> None:
        """`keep_every_n_steps` keeps a copy called `step_<n>.ckpt` at each multiple; null keeps none."""
        super().__init__()
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self._first_step: int | None = None
        self._last_step = 0
        self._completed: tuple[int, dict[str, Any]] | None = None
        self._is_updating = False
        self._interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._last_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._is_updating = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._is_updating = False
        step = trainer.global_step
        if step == self._last_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._last_step = step
        # Lightning copies its counters for it, and a loader its position: nothing goes on counting in here.
        self._completed = (step, trainer.fit_loop.state_dict())
        if step % self.every_n_steps == 0 or step == trainer.max_steps or trainer.should_stop:
            trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        if self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0:
            trainer.save_checkpoint(self.folder / f"step_{step:08d}.ckpt", weights_only=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._first_step is None or trainer.global_step == self._first_step:
            return  # Nothing was learned: whatever there is on disk is as good.
        # SIGTERM stops all ranks at one step; any other exception is alone on its rank, and saving waits for all.
        if trainer.world_size > 1 and not isinstance(exception, SIGTERMException):
            return
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        if self._is_updating and progress.processed < progress.started:
            logger.warning(
                "interrupted while the weights changed: continue with an older checkpoint in %s", self.folder
            )
            return
        self._interrupted = True
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        logger.info("interrupted; continue with ckpt_path=%s", self.folder / LAST)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._interrupted and self._completed is not None and self._completed[0] == trainer.global_step:
            checkpoint["loops"]["fit_loop"] = self._completed[1]
