"""Sparse self-attention over a packed row: the plan of one layer, from its layout and a list of maskers.

| maskers                     | answered by                                             | on         |
| --------------------------- | ------------------------------------------------------- | ---------- |
| sink, local and causal only | `flex`: a block mask from arithmetic, tiles are skipped | CUDA       |
|                             | `sdpa`: tiles of queries with the keys they see         | everything |
|                             | `reference`: every score, as a check                    | everything |
| any other list              | `research`: every score, then most are discarded        | everything |

Both act on each sample by itself, under the layout's own mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flextok.attention.backends.dense import ReferencePlan
from flextok.attention.backends.flex import FlexPlan, add_key_bias
from flextok.attention.backends.ranged import RangedPlan, tiles_of
from flextok.attention.backends.research import MaskStore, ResearchPlan
from flextok.attention.backends.samples import sample_groups
from flextok.attention.density import note_density
from flextok.attention.engine import AttentionRequest, BackendChoice, note_backend, plan_attention, why_not
from flextok.attention.key_intervals import key_intervals
from flextok.attention.layout import SequenceLayout
from flextok.attention.masks import materialize
from flextok.attention.plan import AttentionPlan
from flextok.attention.sparse import GeometricMasker, MaskerConfig, ResearchAttention, ResearchAttentionConfig
from flextok.attention.sparse.block_mask import key_ranges


@dataclass
class LayerMaskers:
    """The maskers of one layer, and what they keep between passes."""

    layer: int
    configs: Sequence[MaskerConfig]
    attention: ResearchAttention = field(init=False)
    meta_data: dict[torch.device, dict[Any, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.attention = ResearchAttention.create_from_config(ResearchAttentionConfig(list(self.configs)))

    @property
    def is_geometric(self) -> bool:
        """Whether the place of a key alone decides."""
        return all(isinstance(masker, GeometricMasker) for masker in self.attention.maskers)


def plan_sparse(
    request: AttentionRequest,
    maskers: LayerMaskers,
    backend: BackendChoice = "auto",
    *,
    seeds: Sequence[int] | None = None,
    store: MaskStore | None = None,
) -> AttentionPlan:
    """The plan of one layer in one pass.

    Args:
        request: its mask is the layout of the row, without a score function.
        seeds: one per sample, for maskers that draw.
        store: masks by content that several passes share.

    Raises:
        ValueError: the request has another mask, or `backend` cannot answer.
    """
    layout = request.mask
    if not isinstance(layout, SequenceLayout) or request.score_mod is not None:
        raise ValueError(
            "sparse attention needs the layout of the packed row and no score function; in the dictionary is "
            f"{type(layout).__name__}{' and a score function' if request.score_mod else ''}"
        )
    if maskers.is_geometric:
        return _plan_geometric(request, layout, maskers, backend)
    if backend not in ("auto", "reference"):
        raise ValueError(f"attention backend {backend!r} cannot choose keys by content; these can: auto, reference")
    note_backend("research")
    groups = sample_groups(layout, request.device, torch.promote_types(request.dtype, torch.float32))
    meta_data = maskers.meta_data.setdefault(request.device, {})
    return ResearchPlan(layout, tuple(groups), maskers.attention, maskers.layer, meta_data, seeds, store)


@dataclass(frozen=True)
class _CountedPlan(AttentionPlan):
    """A plan whose pairs are known beforehand."""

    plan: AttentionPlan
    active: int
    allowed: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        note_density(lambda: (self.active * q.shape[1], self.allowed * q.shape[1]))
        return self.plan.attend(q, k, v, scale)


def counted_dense(plan: AttentionPlan) -> AttentionPlan:
    """The dense plan of a layout, in a trunk of which other layers or passes are sparse."""
    layout = plan.layout
    assert layout is not None
    pairs = layout.derive("allowed pairs", torch.device("cpu"), lambda _: key_intervals(layout, ()).num_pairs)
    return _CountedPlan(layout, plan, pairs, pairs)


def _plan_geometric(
    request: AttentionRequest, layout: SequenceLayout, maskers: LayerMaskers, backend: BackendChoice
) -> AttentionPlan:
    chosen = backend
    if backend == "auto":
        chosen = "flex" if request.device.type == "cuda" else "sdpa"
    reason = "its kernels take no mask" if chosen == "varlen" else why_not(request, chosen)  # type: ignore[arg-type]
    if reason is not None:
        raise ValueError(
            f"attention backend {backend!r} cannot be used here: {reason}; with sink, local and causal maskers "
            "these can: auto, sdpa, reference, and flex"
        )
    note_backend(chosen)
    key = f"sparse plan {backend} {request.dtype} {request.needs_grad} {tuple(maskers.configs)}"
    return layout.derive(key, request.device, lambda _: _geometric(request, layout, maskers, backend, chosen))


def _geometric(
    request: AttentionRequest,
    layout: SequenceLayout,
    maskers: LayerMaskers,
    backend: BackendChoice,
    chosen: BackendChoice,
) -> AttentionPlan:
    device, dtype = request.device, request.dtype
    intervals, allowed = key_intervals(layout, maskers.configs), key_intervals(layout, ()).num_pairs
    active = intervals.num_pairs
    plan: AttentionPlan
    if active == allowed:
        plan = plan_attention(request, backend)
    elif chosen == "sdpa":
        groups = sample_groups(layout, device, dtype)
        ranges = [key_ranges(maskers.configs, group.length, group.length) for group in groups]
        tiles = [tiles_of(group, found, device, dtype) for group, found in zip(groups, ranges, strict=True)]
        plan = RangedPlan(layout, tuple(groups), tuple(tiles))
    else:
        bias = layout.key_bias(device, torch.promote_types(dtype, torch.float32))
        score_mod = None if bias is None else add_key_bias(bias)
        if chosen == "flex":
            plan = FlexPlan(layout, intervals.block_mask(device), score_mod)
        else:
            size = layout.row_length, layout.row_length
            plan = ReferencePlan(layout, materialize(intervals.mask_mod(device), 1, 1, *size, device), score_mod)
    return _CountedPlan(layout, plan, active, allowed)
