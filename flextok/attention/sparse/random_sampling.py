"""Keys drawn uniformly: the baseline of every sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flextok.attention.sparse.config import (
    Given,
    Number,
    SamplingMaskerConfig,
    checked_number,
)
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import SamplingMasker, all_columns, full_like
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.scores import check_shapes
from flextok.attention.sparse.selection import Selection


@dataclass
class RandomSamplingMaskerConfig(SamplingMaskerConfig):
    """A share `sampling_rate` of all keys."""

    sampling_rate: Given[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = "a number above 0 and up to 1"
        self.sampling_rate = float(checked_number("sampling_rate", self.sampling_rate, valid, lambda x: 0 < x <= 1))


@MaskerRegistry.register(RandomSamplingMaskerConfig)
class RandomSamplingMasker(SamplingMasker):
    """Adds, per query, m = max(1, int(rate * Sk)) distinct keys of all Sk, each with probability m / Sk."""

    config: RandomSamplingMaskerConfig

    @torch.no_grad()
    def add_mask(
        self,
        keys: Tensor,
        queries: Tensor,
        values: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        dropout: Number,
        sparse_meta_data: dict[Any, Any] | None,
        previous_mask: Mask,
        **kwargs: Any,
    ) -> Mask:
        if previous_mask.is_full_mask():
            return previous_mask
        check_shapes(queries, keys)
        count = self._count(keys)
        if count >= keys.shape[2]:
            return full_like(previous_mask)
        columns, probabilities = self._draw(queries, keys, count, kwargs.get("generator"))
        drawn = Mask.create_from_row_wise_idx(
            previous_mask.shape, columns, probabilities, "dense", torch.float32, validate=False
        )
        return previous_mask.merge_mask(drawn)

    def _select(
        self,
        keys: Tensor,
        queries: Tensor,
        attention_mask: Tensor | None,
        sparse_meta_data: dict[Any, Any] | None,
        previous: Selection,
        **kwargs: Any,
    ) -> Selection:
        count = self._count(keys)
        if count >= keys.shape[2]:
            return all_columns(queries, keys)
        return self._draw(queries, keys, count, kwargs.get("generator"))

    def _count(self, keys: Tensor) -> int:
        return max(1, int(self.config.sampling_rate * keys.shape[2]))

    def _draw(self, queries: Tensor, keys: Tensor, count: int, generator: torch.Generator | None) -> Selection:
        noise = uniform_noise((*queries.shape[:3], keys.shape[2]), keys.device, generator)
        columns = noise.topk(count, sorted=False).indices
        # Not the nominal rate: what counts is how likely a key really was to be drawn.
        return Selection(columns, torch.full(columns.shape, count / keys.shape[2], device=keys.device))


def uniform_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Float32 in [0, 1) from `generator`, on whatever device that is, or from torch's own."""
    source = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=source).to(device)
