"""The training itself in plain PyTorch, and a stopwatch for runs that train through Lightning."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter, process_time
from typing import Any, NamedTuple
from unittest.mock import patch

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from flextok.data.loaders import ResumableLoader
from flextok.flextok_wrapper import FlexTok
from flextok.model.data_dict import RNG_KEY
from flextok.training.randomness import training_generator
from flextok.training.validation import model_inputs

Batch = dict[str, Any]


class BareLoop:
    """Forward, backward, clipping, optimizer step, schedule and moving average of the weights, and nothing else.

    From the same config it starts with the weights of a run through `train.py` and draws the same numbers, so that
    after the same batches both have the same weights, bit by bit.
    """

    def __init__(self, cfg: DictConfig) -> None:
        torch.manual_seed(cfg.seed)
        self.model: FlexTok = _instantiate(cfg.model).train()
        self.objective: nn.Module = _instantiate(cfg.objective)
        made = _instantiate(cfg.optimizer)(nn.ModuleDict({"model": self.model, "objective": self.objective}))
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.parameters]
        self.decay: float = cfg.callbacks.ema.decay
        self.max_norm: float = cfg.trainer.gradient_clip_val
        self.seed: int = cfg.seed
        self.steps = 0

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, with the draws of the step that is next."""
        rng = training_generator(self.seed, step=self.steps, micro_batch=0, rank=0)
        loss: Tensor = self.objective(self.model, {**model_inputs(self.model, batch), RNG_KEY: rng})["total"]
        return loss

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        with torch.no_grad():
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.steps += 1

    def largest_difference(self, weights: dict[str, Tensor]) -> float:
        """Between the weights here and those of the `state_dict` of a run."""
        return max(
            float((tensor - weights[f"model.{name}"]).abs().max()) for name, tensor in self.model.state_dict().items()
        )


class Seconds(NamedTuple):
    """A stretch of time by the clock on the wall, and what this process computed in it."""

    wall: float
    cpu: float


class Stopwatch:
    """Times each step of a run from its loader: from handing out a batch to being asked for another.

    That is everything but fetching the batch, which is timed apart. After each step, outside of both, `between` is
    called with the batch of that step, and timed as well.
    """

    def __init__(self, between: Callable[[Batch], None] | None = None) -> None:
        self.between = between
        self.fetches: list[Seconds] = []
        self.steps: list[Seconds] = []
        self.others: list[Seconds] = []
        self._handed_out: tuple[Batch, Seconds] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the training batches of every run within the block."""
        original = ResumableLoader.__iter__
        with patch.object(ResumableLoader, "__iter__", lambda loader: self._watch(original(loader))):
            yield
        self._end_step()

    def _watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            # Also here: after the last batch of an epoch Lightning asks for a new iterator, not for another batch.
            self._end_step()
            start = _now()
            batch = next(batches, None)
            if batch is None:
                return
            self.fetches.append(_since(start))
            self._handed_out = batch, _now()
            yield batch

    def _end_step(self) -> None:
        if self._handed_out is None:
            return
        batch, start = self._handed_out
        self.steps.append(_since(start))
        self._handed_out = None
        if self.between is not None:
            start = _now()
            self.between(batch)
            self.others.append(_since(start))


def _now() -> Seconds:
    return Seconds(perf_counter(), process_time())


def _since(start: Seconds) -> Seconds:
    return Seconds(perf_counter() - start.wall, process_time() - start.cpu)


def _instantiate(node: Any) -> Any:
    return hydra.utils.instantiate(node, _convert_="all")
