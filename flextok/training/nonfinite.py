"""Steps whose gradient is not finite: left out, and an end put to a run that makes nothing else."""

import logging
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)


class NonFiniteGuard(Callback):
    """Leaves out optimizer steps whose gradient holds NaN or infinity, and stops the run after too many in a row.

    Neither weights nor moments change in such a step; the learning rate goes on. When the run stops, the last batch is
    in `<folder>/nonfinite_step_<n>_rank_<r>.pt` (of accumulated batches the last), and weights are saved as after any
    exception. With a fused optimizer the host does not wait for the gradient: on a GPU it learns of a step when the one
    after the next starts, and ends the run then. `precision=16-mixed` has a loss scaler that does the leaving out;
    there this callback does nothing.
    """

    def __init__(self, *, folder: str, max_in_a_row: int) -> None:
        """`max_in_a_row`: so many steps are left out one after another; one more ends the run. 0 ends it at once."""
        if max_in_a_row < 0:
            raise ValueError(f"callbacks.nonfinite.max_in_a_row={max_in_a_row}: valid are 0 and above")
        self.folder = Path(folder)
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self._pending: deque[_Pending] = deque()

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_a_row = state_dict["in_a_row"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        if trainer.precision == "16-mixed":
            return
        is_bad = ~pl_module.gradient_norm(optimizer).isfinite()
        # Not `optimizer.defaults`: a resumed run goes on with the groups of its checkpoint.
        if all(group.get("fused") for group in optimizer.param_groups):
            # What torch's loss scaler tells a fused optimizer: it looks at it on the device.
            optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()  # type: ignore[attr-defined]
        elif is_bad:
            optimizer.zero_grad(set_to_none=True)  # Parameters without a gradient are not touched.
        self._pending.append(_Pending.of(trainer.global_step, is_bad))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._pending and self._pending[-1].batch is None:
            self._pending[-1] = self._pending[-1]._replace(batch=batch)
            if self._pending[-1].event is None:
                self._judge(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The last step is left for the next time: to wait for it would leave the GPU without work. Not "whatever is
        # known by now", which may differ between ranks: all of them have to stop at one step.
        while len(self._pending) > 1:
            self._judge(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self._pending:
            self._judge(trainer)

    def _judge(self, trainer: Trainer) -> None:
        """The oldest step of which the verdict is not known."""
        pending = self._pending.popleft()
        if pending.event is not None:
            pending.event.synchronize()
        if not pending.is_bad:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        logger.warning(
            "step %d: the gradient is not finite, the step is left out (%d in a row, at most %d)",
            *(pending.step + 1, self.in_a_row, self.max_in_a_row),
        )
        if self.in_a_row > self.max_in_a_row:
            raise ValueError(
                f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {pending.step + 1}; "
                f"the last batch is in {self._save(trainer, pending)}; try a smaller optimizer.lr or "
                "trainer.precision=32-true, and continue from the last checkpoint"
            )

    def _save(self, trainer: Trainer, pending: "_Pending") -> Path:
        path = self.folder / f"nonfinite_step_{pending.step + 1}_rank_{trainer.global_rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(pending.batch, path)
        return path


class _Pending(NamedTuple):
    """A step whose gradient the host has not looked at."""

    step: int
    is_bad: Tensor
    """On the host; filled when `event` has happened."""
    event: torch.cuda.Event | None
    batch: Any = None

    @classmethod
    def of(cls, step: int, is_bad: Tensor) -> "_Pending":
        if not is_bad.is_cuda:
            return cls(step, is_bad, None)
        event = torch.cuda.Event()
        on_host = is_bad.to("cpu", non_blocking=True)
        event.record()
        return cls(step, on_host, event)
