"""`attend`: one call for every form of mask, answered by a backend that works where it is called.

| backend     | runs on                     | masks                      | gradients  |
| ----------- | --------------------------- | -------------------------- | ---------- |
| `flex`      | CUDA (compiled), CPU        | layout, BlockMask          | CUDA only  |
| `varlen`    | CUDA, half precision        | layout of packed samples   | yes        |
| `sdpa`      | everything                  | layout, BlockMask, dense   | yes        |
| `reference` | everything, as a check      | layout, BlockMask, dense   | yes        |

A trunk plans once per forward pass and hands the plan to its layers; `flextok.model.layers.attention` owns the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from flextok.attention.backends.dense import ReferencePlan
from flextok.attention.backends.flex import FlexPlan, add_key_bias
from flextok.attention.backends.sdpa import DensePlan, plan_sdpa
from flextok.attention.backends.varlen import DTYPES, plan_varlen
from flextok.attention.layout import SequenceLayout
from flextok.attention.plan import AttentionPlan
from flextok.attention.reference import ScoreMod

AttentionMask = SequenceLayout | BlockMask | Tensor | AttentionPlan | None
Backend = Literal["flex", "varlen", "sdpa", "reference"]
BackendChoice = Literal["auto", "flex", "varlen", "sdpa", "reference"]

_record: ContextVar[list[str] | None] = ContextVar("attention_backends", default=None)


@contextmanager
def record_backends() -> Iterator[list[str]]:
    """Yield a list that receives the name of the backend at every plan: one per trunk pass or lone `attend`."""
    names: list[str] = []
    token = _record.set(names)
    try:
        yield names
    finally:
        _record.reset(token)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask = None,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
    backend: BackendChoice = "auto",
) -> Tensor:
    """Softmax attention; rows that may attend to nothing give zeros.

    Args:
        q: `[batch, heads, queries, head_dim]`; k and v `[batch, key heads, keys, head_dim]`, where the heads are a
            multiple of the key heads: neighbouring ones share keys and values, which are not copied.
        mask: a layout of the packed row (batch 1), a `BlockMask`, a tensor broadcastable to
            `[batch, heads, queries, keys]` (bool, True attends, or floats added to the scores, -inf to hide), None, or
            a plan made of one of these.

    Raises:
        ValueError: the backend asked for cannot do it; the message says which can.
    """
    if not isinstance(mask, AttentionPlan):
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        request = AttentionRequest(mask, q.shape[2], k.shape[2], q.device, q.dtype, needs_grad, score_mod)
        mask = plan_attention(request, backend)
    elif score_mod is not None:
        raise ValueError("score_mod is part of a plan: give it to plan_attention")
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        raise ValueError(
            f"q, k and v have {q.shape[1]}, {k.shape[1]} and {v.shape[1]} heads; valid: as many in v as in k, and a "
            "multiple of them in q"
        )
    return mask.attend(q, k, v, scale)


@dataclass(frozen=True)
class AttentionRequest:
    """What decides which backend can answer."""

    mask: SequenceLayout | BlockMask | Tensor | None
    num_queries: int
    num_keys: int
    device: torch.device
    dtype: torch.dtype
    needs_grad: bool
    score_mod: ScoreMod | None = None


def plan_attention(request: AttentionRequest, backend: BackendChoice = "auto") -> AttentionPlan:
    """Choose a backend and prepare its index tensors; plans of a layout are made once and shared."""
    mask = request.mask
    if isinstance(mask, SequenceLayout) and not request.num_queries == request.num_keys == mask.row_length:
        raise ValueError(f"the mask describes {mask.row_length} tokens, the sequence has {request.num_queries}")
    chosen = _choose(request) if backend == "auto" else _checked(request, backend)
    names = _record.get()
    if names is not None:
        names.append(chosen)
    if isinstance(mask, SequenceLayout) and request.score_mod is None:
        key = f"plan {chosen} {request.dtype}"
        return mask.derive(key, request.device, lambda _: _plan(request, chosen))
    return _plan(request, chosen)


def why_not(request: AttentionRequest, backend: Backend) -> str | None:
    """Why a backend cannot answer a request; None if it can."""
    mask, on_cuda = request.mask, request.device.type == "cuda"
    if backend == "flex":
        if isinstance(mask, Tensor):
            return "it takes a layout or a BlockMask, no dense mask"
        if not on_cuda and request.needs_grad:
            return "FlexAttention has no backward on the CPU"
    if backend == "varlen":
        if not on_cuda:
            return "its kernels exist for CUDA only"
        if request.dtype not in DTYPES:
            return f"it computes in bfloat16 or float16, not in {request.dtype}"
        if not isinstance(mask, SequenceLayout) or request.score_mod is not None:
            return "it takes the layout of a packed row and no score function"
        if mask.last_counts is not None:
            return "it cannot count a key more than once"
    if backend == "sdpa" and request.score_mod is not None:
        return "it takes no score function"
    return None


def _checked(request: AttentionRequest, backend: str) -> Backend:
    for name in get_args(Backend):
        if name == backend:
            reason = why_not(request, name)
            if reason is None:
                return name
            working = ", ".join(["auto", *(other for other in get_args(Backend) if why_not(request, other) is None)])
            raise ValueError(f"attention backend {backend!r} cannot be used here: {reason}; these can: {working}")
    raise ValueError(f"attention backend {backend!r} is unknown; valid: {', '.join(get_args(BackendChoice))}")


def _choose(request: AttentionRequest) -> Backend:
    ranking: tuple[Backend, ...] = ("sdpa", "flex", "reference")
    if request.score_mod is not None or isinstance(request.mask, BlockMask):
        ranking = ("flex", "sdpa", "reference")
    elif isinstance(request.mask, SequenceLayout) and request.device.type == "cuda":
        # Equal samples are a plain batch; a padded one would need a mask, which the fast kernels do not take.
        ranking = ("sdpa",) if request.mask.is_uniform and request.mask.mode == "full" else ("varlen", "flex")
    return next(backend for backend in ranking if why_not(request, backend) is None)


def _plan(request: AttentionRequest, backend: Backend) -> AttentionPlan:
    mask, score_mod, device = request.mask, request.score_mod, request.device
    layout = mask if isinstance(mask, SequenceLayout) else None
    if layout is not None and backend in ("flex", "reference"):
        bias = layout.key_bias(device, torch.promote_types(request.dtype, torch.float32))
        score_mod = score_mod if bias is None else add_key_bias(bias, score_mod)
    if backend == "flex":
        assert not isinstance(mask, Tensor)
        return FlexPlan(layout, mask.block_mask(device) if isinstance(mask, SequenceLayout) else mask, score_mod)
    if backend == "reference":
        return ReferencePlan(layout, _dense(request), score_mod)
    if layout is None:
        return DensePlan(None, _dense(request))
    return plan_varlen(layout, device) if backend == "varlen" else plan_sdpa(layout, device, request.dtype)


def _dense(request: AttentionRequest) -> Tensor | None:
    mask = request.mask
    if isinstance(mask, SequenceLayout):
        return mask.dense_mask(request.device)
    if isinstance(mask, BlockMask):
        batch, heads = mask.shape[:2]
        size = request.num_queries, request.num_keys
        return create_mask(mask.mask_mod, batch, heads, *size, device=str(request.device))
    return mask
