"""Adaptive sampling (vAttention, arXiv 2510.05688): as many random keys as an error of the denominator allows.

Per query, D is the sum of exp(logit) over what earlier maskers hold and over the residual: keys in a range that none of
them holds. A base sample of the residual tells its mean and spread, from which follows how many keys to draw so that
the estimate D' is within `epsilon * D` with probability `1 - delta`. These are then drawn afresh, without replacement.

The bound is asymptotic: few base samples of heavy-tailed terms miss it. Without a correction for finite populations it
is kept with room to spare where a large part of the residual is drawn. The numerator has no such guarantee.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from flextok.attention.sparse.config import (
    Given,
    Number,
    SamplingMaskerConfig,
    Size,
    checked_number,
    num_keys_of,
)
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import SamplingMasker, candidates, full_like
from flextok.attention.sparse.random_sampling import uniform_noise
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.scores import allowed_pairs, logits


@dataclass
class AdaptiveSamplingMaskerConfig(SamplingMaskerConfig):
    """Error `epsilon` of the softmax denominator with probability `1 - delta`, between two offsets."""

    base_rate_sampling: Given[Size]
    """Keys of the base sample: a number (int), or a share of the residual (float below 1). 0: nothing is added."""
    epsilon: Given[float]
    delta: Given[float]
    init_offset: Given[Size]
    """Keys left out at the start; meant to be those of the sink."""
    local_offset: Given[Size]
    """Keys left out at the end; meant to be those of the local window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("base_rate_sampling", "init_offset", "local_offset"):
            is_base = name == "base_rate_sampling"
            setattr(self, name, _checked_rate(name, getattr(self, name), "[0, 1)" if is_base else "[0, 1]"))
        for name in ("epsilon", "delta"):
            valid = "a number above 0 and below 1"
            setattr(self, name, float(checked_number(name, getattr(self, name), valid, lambda x: 0 < x < 1)))


def _checked_rate(name: str, value: Any, interval: str) -> Size:
    def is_valid(number: Size) -> bool:
        is_share = 0 <= number < 1 or (number == 1 and interval.endswith("]"))
        return number >= 0 if isinstance(number, int) else is_share

    return checked_number(name, value, f"an int >= 0 or a float in {interval}", is_valid)


@MaskerRegistry.register(AdaptiveSamplingMaskerConfig)
class AdaptiveSamplingMasker(SamplingMasker):
    """Adds, per query, as many residual keys as the bound asks for, each with probability drawn / residual."""

    config: AdaptiveSamplingMaskerConfig

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
        if previous_mask.is_full_mask() or self.config.base_rate_sampling == 0:
            return previous_mask
        num_keys = keys.shape[2]
        start = num_keys_of(self.config.init_offset, num_keys)
        stop = num_keys - num_keys_of(self.config.local_offset, num_keys)
        if stop - start < 2:
            return full_like(previous_mask)
        scores = logits(queries, keys, scaling, attention_mask)
        key = torch.arange(num_keys, device=keys.device)
        residual = candidates(previous_mask, attention_mask) & (key >= start) & (key < stop)
        probability = previous_mask.get_dense_mask().to(scores.dtype)
        allowed = allowed_pairs(attention_mask, scores.shape)
        if allowed is not None:
            probability = probability * allowed
        num_residual = residual.sum(-1, keepdim=True)
        # Over keys that count: another one's large logit would make all of them underflow.
        highest = scores.masked_fill(~(residual | (probability > 0)), float("-inf")).amax(-1, keepdim=True)
        terms = (scores - highest.masked_fill(highest == float("-inf"), 0)).exp().double()
        static = torch.where(probability > 0, terms / probability, 0).sum(-1, keepdim=True)
        generator = kwargs.get("generator")
        num_base = self._num_base(num_residual)
        base = draw(residual, num_base, generator)
        budget = self._budget(terms, base, num_base, static, num_residual)
        # Not the base sample: it decided the number, and would tie that to what is drawn.
        drawn = draw(residual, budget, generator)
        value = torch.where(drawn, budget.double() / num_residual.clamp(min=1), 0).float()
        return previous_mask.merge_mask(
            Mask.create_mask_from_dense_mask(previous_mask.shape, value, torch.float32, validate=False)
        )

    def _num_base(self, num_residual: Tensor) -> Tensor:
        rate = self.config.base_rate_sampling
        wanted = torch.full_like(num_residual, rate) if isinstance(rate, int) else (rate * num_residual.double()).long()
        return wanted.clamp_(min=2).minimum(num_residual)

    def _budget(self, terms: Tensor, base: Tensor, num_base: Tensor, static: Tensor, num_residual: Tensor) -> Tensor:
        """How many residual keys to draw per row, int64 `(B, H, Sq, 1)`."""
        mean = torch.where(base, terms, 0).sum(-1, keepdim=True) / num_base
        squares = torch.where(base, terms - mean, 0).square().sum(-1, keepdim=True)
        deviation = (squares / (num_base - 1)).sqrt()
        estimate = static + num_residual * mean
        # Two-sided: an error may go either way.
        quantile = NormalDist().inv_cdf(1 - self.config.delta / 2)
        needed = (quantile * num_residual * deviation / (self.config.epsilon * estimate)).square().ceil()
        # NaN where the sample tells nothing, one key or terms that are all 0: then every key is taken.
        needed = torch.where(needed.isnan(), torch.inf, needed)
        return needed.minimum(num_residual.double()).long().maximum(num_base)


def draw(population: Tensor, count: Tensor, generator: torch.Generator | None) -> Tensor:
    """Per row, `count` `(..., 1)` of the True entries of `population` `(..., n)`, uniformly and without replacement."""
    noise = uniform_noise(population.shape, population.device, generator)
    order = noise.masked_fill_(~population, 2).argsort(-1)
    is_drawn = torch.arange(population.shape[-1], device=population.device) < count
    return torch.zeros_like(population).scatter_(-1, order, is_drawn)
