"""The flow loss by number of tokens and by time: what the mean over whatever was drawn hides."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flextok.training.measurement import Measurement
from flextok.training.objective import PASSES_KEY, FlowPass

_Passes = list[FlowPass]


class LossBuckets(Measurement[_Passes]):
    """Logs `train/flow_loss/k<from>-<to>`, `train/flow_loss/null` and `train/flow_loss/t<from>-<to>`.

    Buckets of `keep_k` end at powers of two; samples that saw the null condition have one of their own. Times lie in
    equal parts of [0, 1]. All passes of the decoder count alike. A bucket that no sample fell into is not logged.
    """

    def __init__(self, *, num_times: int) -> None:
        super().__init__()
        self.num_times = num_times
        self._ends: list[int] = []
        """The largest `keep_k` of each bucket; 0 is the null condition."""
        self._totals: Tensor | None = None
        """`[2, buckets]` on the device: sums of losses, and how many there are."""

    def observe(self, module: Any) -> _Passes | None:
        self._ends = self._ends or [0, *keep_k_ends(module.model.num_registers)]
        return module.observed.get(PASSES_KEY) or None

    def collect(self, steps: Sequence[_Passes]) -> None:
        errors, times, kept = (torch.cat(parts) for parts in zip(*chain.from_iterable(steps), strict=True))
        if self._totals is None:
            self._totals = torch.zeros(2, len(self._ends) + self.num_times, device=errors.device)
        values = torch.stack([errors, torch.ones_like(errors)])
        by_k = torch.bucketize(kept, torch.tensor(self._ends)).to(errors.device, non_blocking=True)
        by_time = (times * self.num_times).long().clamp(0, self.num_times - 1) + len(self._ends)
        self._totals.index_add_(1, by_k, values).index_add_(1, by_time, values)

    def take(self) -> dict[str, float]:
        if self._totals is None:
            return {}
        sums, counts = self._totals.tolist()
        self._totals.zero_()
        names = [*map(_name, [0, *self._ends], self._ends), *self._time_names()]
        return {
            f"train/flow_loss/{name}": total / count
            for name, total, count in zip(names, sums, counts, strict=True)
            if count
        }

    def _time_names(self) -> list[str]:
        edges = [f"{part / self.num_times:.3g}" for part in range(self.num_times + 1)]
        return [f"t{start}-{end}" for start, end in zip(edges, edges[1:], strict=False)]


def keep_k_ends(num_registers: int) -> list[int]:
    """The largest `keep_k` of each bucket: powers of two, and the number of registers."""
    return sorted({2**exponent for exponent in range(num_registers.bit_length())} | {num_registers})


def _name(previous_end: int, end: int) -> str:
    if end == 0:
        return "null"
    return f"k{end}" if end == previous_end + 1 else f"k{previous_end + 1}-{end}"
