"""When checkpoints are written: regularly, after the last step, and when a run is interrupted."""

import logging
import signal
import threading
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from flextok.training.checkpoint_files import LAST, CheckpointNotWritten

logger = logging.getLogger(__name__)


class RegularCheckpoint(Checkpoint):
    """Writes `last.ckpt` every n steps, after the final step and on an exception, SIGTERM or Ctrl-C.

    Continuing from any of them gives the numbers of a run that was never interrupted. An exception strikes in
    the middle of a step, when the data loader has moved on but the weights have not: what is written then is the
    position of the last completed step. (Lightning's `OnExceptionCheckpoint` writes the position it finds and
    loses a batch.) What `last.ckpt` replaces stays as `previous.ckpt`.
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
        self._signals = HeldSignals(signal.SIGINT, signal.SIGCHLD)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._last_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._is_updating = True
        self._signals.hold()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._is_updating = False
        step = trainer.global_step
        if step == self._last_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._signals.let_go()
            return
        self._last_step = step
        # Lightning copies its counters for it, and a loader its position: nothing goes on counting in here.
        self._completed = (step, trainer.fit_loop.state_dict())
        self._signals.let_go()
        if step % self.every_n_steps == 0 or step == trainer.max_steps or trainer.should_stop:
            trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        if self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0:
            trainer.save_checkpoint(self.folder / f"step_{step:08d}.ckpt", weights_only=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signals.forget()
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
        self._signals.hold()  # The workers that are left end now, and torch takes each for one that died.
        try:
            trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        except CheckpointNotWritten as error:
            # Not raised: the loggers still have to write what they hold, and the first error says why all this happens.
            logger.error("the last completed step is lost: %s", error)
            return
        finally:
            self._signals.forget()
        logger.info("interrupted; continue with ckpt_path=%s", self.folder / LAST)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._interrupted and self._completed is not None and self._completed[0] == trainer.global_step:
            checkpoint["loops"]["fit_loop"] = self._completed[1]


class HeldSignals:
    """Signals that wait while numbers change that belong together: weights, schedule, average, position in the data.

    Python handles a signal between any two of its instructions. Ctrl-C, and a data worker that dies, would otherwise
    leave half of an update, and nothing to save.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self.numbers = numbers
        self._handlers: dict[int, Any] = {}
        self._arrived: list[tuple[int, Any]] = []

    def hold(self) -> None:
        """From here on signals are noted and not handled. Only the main thread can do so."""
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in self.numbers:
            if callable(signal.getsignal(number)):
                self._handlers[number] = signal.signal(number, lambda *arrival: self._arrived.append(arrival))

    def let_go(self) -> None:
        """Handle what has arrived, and all that arrives from now on."""
        handlers, arrived = self._handlers, self._arrived
        self.forget()
        for number, frame in arrived:
            handlers[number](number, frame)

    def forget(self) -> None:
        """As `let_go`, but what has arrived is dropped."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers, self._arrived = {}, []
