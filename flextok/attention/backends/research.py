"""Sparse attention by what keys contain: all scores are computed and most discarded, so it is never faster than dense.

Maskers act on each sample by itself, under the mask that the layout gives it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flextok.attention.backends.samples import SampleGroup, put_back
from flextok.attention.backends.sdpa import _sdpa
from flextok.attention.density import note_density
from flextok.attention.plan import AttentionPlan
from flextok.attention.sparse import MagicPig, Mask, ResearchAttention, SamplingMasker, masked_attention


@dataclass
class MaskStore:
    """Masks that several passes over the same samples share, such as neighbouring steps of a sampler.

    Each sample keeps its own, made in one pass and used until `every` passes later.
    """

    every: int
    now: int = 0
    """Number of the pass."""
    made: dict[tuple[int, int], tuple[int, Tensor]] = field(default_factory=dict)
    """By layer and sample: the pass, and values `[heads, length, length]`."""

    def get(self, layer: int, sample: int, length: int) -> Tensor | None:
        """What still serves."""
        made, values = self.made.get((layer, sample), (0, None))
        fits = values is not None and values.shape[-1] == length and self.now - made < self.every
        return values if fits else None

    def put(self, layer: int, sample: int, values: Tensor) -> None:
        """Keep what was made in this pass."""
        self.made[layer, sample] = self.now, values


@dataclass(frozen=True)
class ResearchPlan(AttentionPlan):
    """Attention of one layer and pass under what its maskers select."""

    groups: tuple[SampleGroup, ...]
    attention: ResearchAttention
    layer: int
    meta_data: dict[Any, Any]
    """What maskers keep between calls."""
    seeds: Sequence[int] | None
    """One per sample, for maskers that draw; None takes torch's own generator."""
    store: MaskStore | None
    """None: masks are made anew in each pass."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return put_back(self.groups, [self._group(group, q, k, v, scale) for group in self.groups], q)

    def _group(self, group: SampleGroup, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`[samples, length, heads, width]`."""
        q, k, v = group.of(q), group.of(k), group.of(v)
        mask = self._mask(group, q, k, v, scale)
        note_density(lambda: _count(group, mask))
        if mask.is_full_mask():
            bias = group.mask if group.mask is None or group.mask.dtype == torch.bool else group.mask.to(q.dtype)
            return _sdpa(q, k, v, bias, scale).transpose(1, 2)
        return masked_attention(q, k, v, mask, scale, group.mask)[0]

    def _mask(self, group: SampleGroup, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mask:
        def make(places: slice | Tensor, **options: Any) -> Mask:
            some = q[places], k[places], v[places]
            options["layer_idx"] = self.layer
            return self.attention.build_mask(*some, group.mask, scale, 0.0, self.meta_data, **options)

        if self.store is None:
            return self._drawn(group, make, range(len(group.samples)))
        known = {sample: self.store.get(self.layer, sample, group.length) for sample in group.samples}
        missing = [place for place, sample in enumerate(group.samples) if known[sample] is None]
        if missing:
            for place, values in zip(missing, self._drawn(group, make, missing).get_dense_mask(), strict=True):
                known[group.samples[place]] = values
                self.store.put(self.layer, group.samples[place], values)
        stacked = torch.stack([values for values in known.values() if values is not None])
        return Mask.create_mask_from_dense_mask(stacked.shape, stacked, stacked.dtype, validate=False)

    def _drawn(self, group: SampleGroup, make: Callable[..., Mask], places: Sequence[int]) -> Mask:
        """The mask of some samples of a group; those who draw do it one by one, each from its own generator."""
        if self.seeds is None or not draws(self.attention):
            is_all = len(places) == len(group.samples)
            return make(slice(None) if is_all else torch.tensor(places))
        masks = []
        for place in places:
            # Layers lie far apart, or those of one sample would draw what its next one draws.
            seed = self.seeds[group.samples[place]] + 1_000_003 * self.layer
            masks.append(make(slice(place, place + 1), generator=torch.Generator().manual_seed(seed)).get_dense_mask())
        values = torch.cat(masks)
        return Mask.create_mask_from_dense_mask(values.shape, values, values.dtype, validate=False)


def draws(attention: ResearchAttention) -> bool:
    """Whether maskers draw from a generator. MagicPig does not: its randomness comes from its own seed."""
    return any(isinstance(masker, SamplingMasker) and not isinstance(masker, MagicPig) for masker in attention.maskers)


def _count(group: SampleGroup, mask: Mask) -> tuple[int, int]:
    heads = mask.shape[1]
    allowed = sum(group.seen) * heads * len(group.samples)
    if mask.is_full_mask():
        return allowed, allowed
    active = mask.get_dense_mask() > 0
    if group.mask is not None and group.mask.dtype == torch.bool:
        active &= group.mask
    return int(active.count_nonzero()), allowed
