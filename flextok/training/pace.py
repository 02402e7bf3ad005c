"""How fast training moves, what it waits for, and how much memory it needs."""

import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import nn

from flextok.attention.layout import SequenceLayout
from flextok.model.trunks.transformers import FlexTransformer
from flextok.training.flops import stated_peak, trunk_training_flops, trunk_weights, visible_pairs
from flextok.training.progress import is_logged

GIB = 2**30


class TrainingPace(Callback):
    """Logs what a stretch from one logged step to the next took, validation not counted.

    Over such a stretch the clock of the host is right for a GPU too, without waiting for it. Images and tokens per
    second are those of this rank times the number of ranks.
    """

    def __init__(self, *, peak_flops: float | None) -> None:
        """`peak_flops`: FLOP/s of one device, for the MFU; None looks the GPU up, in half precision only."""
        self.peak_flops = peak_flops
        self._work = _Work()
        self._mark: _Work | None = None
        self._clock: FetchClock | None = None
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for trunk in pl_module.modules():
            if isinstance(trunk, FlexTransformer):
                self._handles.append(trunk.register_forward_hook(_CountWork(self, trunk_weights(trunk))))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = None  # The first step warms up and does not count.
        self._clock = FetchClock(trainer.profiler)  # type: ignore[attr-defined]
        trainer.profiler = self._clock  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._mark is not None:
            self._mark = self._now(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._work = self._work._replace(images=self._work.images + len(batch["key"]))
        if self._mark is None:
            self._mark = self._now(trainer.global_step)
        elif is_logged(trainer) and trainer.global_step > self._mark.step:
            now = self._now(trainer.global_step)
            since = _Work._make(b - a for a, b in zip(self._mark, now, strict=True))
            pl_module.log_dict(self._numbers(trainer, since))
            self._mark = now

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._clock is not None:
            trainer.profiler = self._clock.profiler  # type: ignore[attr-defined]
            self._clock = None

    def _now(self, step: int) -> "_Work":
        assert self._clock is not None
        return self._work._replace(seconds=perf_counter(), waited=self._clock.seconds, step=step)

    def _numbers(self, trainer: Trainer, work: "_Work") -> dict[str, float]:
        device = trainer.strategy.root_device
        numbers = {
            "train/images_per_second": work.images / work.seconds * trainer.world_size,
            "train/tokens_per_second": work.tokens / work.seconds * trainer.world_size,
            "train/step_seconds": work.seconds / work.step,
            "train/data_wait_share": work.waited / work.seconds,
        }
        peak = self.peak_flops or _known_peak(device, str(trainer.precision))
        if peak is not None:
            numbers["train/mfu"] = work.flops / work.seconds / peak
        return numbers | dict(_memory(device))

    def add(self, *, tokens: int, flops: int) -> None:
        """Count the work of a pass through a trunk."""
        self._work = self._work._replace(tokens=self._work.tokens + tokens, flops=self._work.flops + flops)


class FetchClock:
    """A profiler that also adds up how long the training loop waits for its loader; the rest is that of `profiler`.

    Lightning tells its profiler when it asks the loader for a batch, and when it has one. From the end of a step to the
    start of the next would be too long: in between loggers and, with several ranks, Lightning itself wait for the GPU.
    """

    ACTION = "train_dataloader_next"

    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler
        self.profile = profiler.profile  # Asked for a hundred times in a step.
        self.seconds = 0.0
        self._asked = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(self.ACTION):
            self._asked = perf_counter()
        self.profiler.start(action_name)

    def stop(self, action_name: str) -> None:
        self.profiler.stop(action_name)
        if action_name.endswith(self.ACTION):
            self.seconds += perf_counter() - self._asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self.profiler, name)


class _Work(NamedTuple):
    """What was done up to a moment, or between two."""

    seconds: float = 0.0
    waited: float = 0.0
    step: int = 0
    images: int = 0
    tokens: int = 0
    flops: int = 0


class _CountWork:
    """A forward hook of a trunk."""

    def __init__(self, pace: TrainingPace, weights: dict[str, int]) -> None:
        self.pace = pace
        self.weights = weights

    def __call__(self, trunk: nn.Module, inputs: Any, output: dict[str, Any]) -> None:
        assert isinstance(trunk, FlexTransformer)
        layout = output.get(trunk.block_mask_read_key or "")
        if not trunk.training or not isinstance(layout, SequenceLayout):
            return
        flops = trunk_training_flops(
            **self.weights, tokens=layout.num_tokens, samples=len(layout.lengths), pairs=visible_pairs(layout)
        )
        trains = output[trunk.output_seq_write_key].requires_grad
        self.pace.add(tokens=layout.num_tokens, flops=flops if trains else flops // 3)


def _known_peak(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda" or not precision.endswith("mixed"):
        return None
    stated = stated_peak(torch.cuda.get_device_name(device))
    return None if stated is None else stated[0]


def _memory(device: torch.device) -> Iterator[tuple[str, float]]:
    """The most there was so far, in GiB, of this process and of its GPU; what data workers hold is not in it."""
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        yield "memory/host_peak_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    if device.type == "cuda":
        yield "memory/gpu_peak_allocated_gib", torch.cuda.max_memory_allocated(device) / GIB
        yield "memory/gpu_peak_reserved_gib", torch.cuda.max_memory_reserved(device) / GIB
