"""A signal stops a run between two steps, with everything saved: preemption, the end of a time limit, a shutdown."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)

# SLURM sends SIGTERM, and before the time limit what `--signal` says: SIGUSR1 by habit, SIGUSR2 from submitit.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# "Try again later": a batch script can tell it from success and from a mistake.
EXIT_CODE = os.EX_TEMPFAIL


class StopOnSignal(Callback):
    """Stops training where SIGTERM, SIGUSR1 or SIGUSR2 arrives: after the step that is running, on all ranks at once.

    It raises Lightning's `SIGTERMException`, at which `RegularCheckpoint` saves the last completed step. One process
    stops within a validation too; several, which need not validate equally many batches, stop after it. Before the
    first step there is nothing to save, and it stops at once.

    Only one program may answer a signal, so Lightning's own handlers are replaced. That of SIGTERM sends a message
    to the other ranks from within the handler, which may meet one about gradients. That of SIGUSR1 under SLURM requeues
    the job itself and saves a second kind of checkpoint, in the middle of a step. Whoever listened before training,
    such as submitit, which requeues its jobs, is called by `leave` when all is saved.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process: int | None = None
        self._is_training = False
        self._asked: tuple[Any, torch.Tensor] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the signals are ours; afterwards they are whose they were."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other set handlers.
            yield
            return
        self._process = os.getpid()
        former = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._listen()
        try:
            yield
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # Again: Lightning has set its own handlers since.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # There need not be a sanity check.
        self._is_training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not at the end of the step before, where other callbacks have yet to see that step.
        if self._is_anyone_told(trainer):
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answer()  # A message under way would outlive the processes that it is for.

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        # The last one is completed: nothing would repeat it.
        if trainer.world_size == 1 and self.signum is not None and trainer.global_step < trainer.max_steps:
            raise SIGTERMException

    def _listen(self) -> None:
        if self._process is not None:
            for signum in SIGNALS:
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # A worker of a loader, which has inherited the handler.
        self.signum = signum
        if not self._is_training:
            raise SIGTERMException

    def _is_anyone_told(self, trainer: Trainer) -> bool:
        """The same answer on all ranks: that to the question of the step before, so that nobody waits for it."""
        if trainer.world_size == 1:
            return self.signum is not None
        if self._answer():
            return True
        told = torch.full((1,), float(self.signum is not None), device=trainer.strategy.root_device)
        self._asked = (dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True), told)
        return False

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        (work, told), self._asked = self._asked, None
        work.wait()
        return bool(told.item())

    def leave(self, trainer: Trainer, folder: str) -> NoReturn:
        """End the process of a run that was stopped and saved; `folder` is that of the run.

        Rank 0 alone ends with `EXIT_CODE`, the others with 0: Lightning kills all processes it started when one of the
        others fails.
        """
        name = "a signal" if self.signum is None else signal.Signals(self.signum).name
        if trainer.is_global_zero:
            logger.info(
                "stopped by %s after step %d; to go on: the same command with hydra.run.dir=%s ckpt_path=auto",
                *(name, trainer.global_step, folder),
            )
        handler = None if self.signum is None else signal.getsignal(self.signum)
        if self.signum is not None and callable(handler):
            handler(self.signum, None)  # submitit requeues here, and does not return.
        raise SystemExit(EXIT_CODE if trainer.is_global_zero else os.EX_OK)
