"""How much of the codebook training uses."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flextok.model.packed_list import offset_ranges
from flextok.training.measurement import Measurement
from flextok.training.objective import PASSES_KEY, FlowPass


class _Tokens(NamedTuple):
    """The ids of a batch, and how many of each sample a decoder saw."""

    ids: Sequence[Tensor]
    """`[1, n]` of each sample, on the device."""
    kept: list[Tensor]
    """`[batch]` on the host, of each pass through the decoder."""


class CodebookUsage(Measurement[_Tokens]):
    """Logs `train/codebook/...` of the ids in the steps since they were logged before.

    Counted are the tokens a decoder saw: the encoder computes no other, and none of samples of the null condition.
    Names and meaning are those of evaluation (`flextok.evaluation.tokens`), there of a whole test split. The codebook
    is that of an `FSQ`, whose channels are looked at one by one too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._levels: list[int] = []
        self._counts: Tensor | None = None
        """`[codebook size]` int64 on the device."""

    def observe(self, module: Any) -> _Tokens | None:
        passes: list[FlowPass] = module.observed.get(PASSES_KEY, [])
        tokens = module.observed.get(module.model.token_write_key)
        if not passes or tokens is None:
            return None
        self._levels = module.model.regularizer.levels
        return _Tokens(tokens, [one.kept for one in passes])

    def collect(self, steps: Sequence[_Tokens]) -> None:
        samples = [entry for step in steps for entry in step.ids]
        ids, lengths = torch.cat(samples, dim=1)[0], torch.tensor([entry.shape[1] for entry in samples])
        kept = torch.cat([torch.stack(step.kept).amax(0) for step in steps])
        if self._counts is None:
            self._counts = torch.zeros(math.prod(self._levels), dtype=torch.int64, device=ids.device)
        rows = offset_ranges(lengths.cumsum(0) - lengths, kept).to(ids.device, non_blocking=True)
        # Not `bincount`, which waits for the device to learn the largest id.
        self._counts.index_add_(0, ids.index_select(0, rows), torch.ones_like(rows))

    def take(self) -> dict[str, float]:
        if self._counts is None:
            return {}
        entropies = [_entropy_bits(self._counts)]
        # The first channel is the fastest digit of an id.
        digits = self._counts.view(*reversed(self._levels))
        for axis in reversed(range(digits.ndim)):
            entropies.append(_entropy_bits(digits.movedim(axis, 0).reshape(digits.shape[axis], -1).sum(1)))
        used, total = (self._counts > 0).sum(), self._counts.sum()
        used_host, total_host, entropy, *channels = torch.stack([used.float(), total.float(), *entropies]).tolist()
        self._counts.zero_()
        if total_host == 0:
            return {}
        size = math.prod(self._levels)
        numbers = {
            "codebook_usage": used_host / size,
            "codebook_usage_ceiling": min(1.0, total_host / size),
            "perplexity": 2**entropy,
        }
        numbers |= {f"entropy_bits_channel_{channel}": bits for channel, bits in enumerate(channels)}
        return {f"train/codebook/{name}": number for name, number in numbers.items()}


def _entropy_bits(counts: Tensor) -> Tensor:
    """Scalar: empirical entropy in bits of the counts of a tensor of any shape."""
    shares = counts / counts.sum().clamp(min=1)
    return -torch.xlogy(shares, shares).sum() / math.log(2)
