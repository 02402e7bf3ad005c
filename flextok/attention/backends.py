"""`attend`: one call for every form of mask, answered by a backend that works on the device at hand.

`flextok.model.layers.attention` owns the weights; this module owns the mechanism.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from flextok.attention.layout import SequenceLayout
from flextok.attention.reference import ScoreMod, reference_attention

AttentionMask = SequenceLayout | BlockMask | Tensor | None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask = None, *, scale: float, score_mod: ScoreMod | None = None
) -> Tensor:
    """Softmax attention; rows that may attend to nothing give zeros.

    q `[batch, heads, queries, head_dim]`; k, v `[batch, heads, keys, head_dim]`. `mask`: a layout of the packed row
    (batch 1), a `BlockMask`, a bool tensor broadcastable to `[batch, heads, queries, keys]` (True attends), or None.
    """
    if score_mod is not None or isinstance(mask, BlockMask):
        return _flex(q, k, v, mask, scale=scale, score_mod=score_mod)
    if isinstance(mask, SequenceLayout):
        return _sdpa_layout(q, k, v, mask, scale=scale)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return _sdpa_bool(q, k, v, mask, scale=scale)


def _sdpa_bool(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    # Rows without a key are given all keys and zeroed afterwards: some fused kernels return NaN for them.
    visible = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~visible, scale=scale)
    return out.masked_fill(~visible, 0.0)


class _BatchPlan(NamedTuple):
    """How a packed row becomes a batch `[samples, heads, longest, head_dim]` and back; shared by all layers."""

    gather: Tensor | None
    """`[samples * longest]` places in the row; None if the samples lie there back to back with equal lengths."""
    scatter: Tensor | None
    """`[num_tokens]` places in the flattened batch; None like `gather`."""
    mask: Tensor | None
    """bool `[samples | 1, 1, longest | 1, longest]`; None if every token of a sample attends to every other."""
    hidden: Tensor | None
    """bool `[samples, 1, longest, 1]`: rows to zero (dropped tokens, places past the end of a sample)."""


def _batch_plan(layout: SequenceLayout, device: torch.device) -> _BatchPlan:
    samples, longest = len(layout.lengths), max(layout.sample_lengths)
    table = layout.table(device)
    gather = scatter = mask = hidden = None
    if not layout.is_uniform:
        lengths = torch.tensor(layout.sample_lengths, device=device)
        place = torch.arange(longest, device=device)
        inside = place < lengths[:, None]
        starts = lengths.cumsum(0) - lengths
        gather = torch.where(inside, starts[:, None] + place, 0).flatten()
        scatter = inside.flatten().nonzero()[:, 0]

    def batched(values: Tensor) -> Tensor:
        return (values[: layout.num_tokens] if gather is None else values[gather]).view(samples, 1, longest, 1)

    if layout.drops_tokens or gather is not None:
        hidden = batched(table.sample < 0)
        if gather is not None:
            hidden = hidden | ~inside[:, None, :, None]
        mask = ~hidden.transpose(-1, -2)
    if layout.mode != "full":
        allowed = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()[None, None]
        if layout.mode == "causal_last":
            before_last = batched(table.before_last).transpose(-1, -2)
            allowed = allowed | (before_last[:1] if layout.is_uniform else before_last)
        mask = allowed if mask is None else mask & allowed
    if hidden is not None and mask is not None:
        # Hidden rows are zeroed afterwards; until then they need some key, or a fused kernel may return NaN.
        mask = mask | hidden if layout.mode != "full" else mask | hidden.all(2, keepdim=True)
    return _BatchPlan(gather, scatter, mask, hidden)


def _sdpa_layout(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, *, scale: float) -> Tensor:
    """Attention within each sample as one batch over samples: never a matrix over the whole row."""
    row, samples, longest = q.shape[2], len(layout.lengths), max(layout.sample_lengths)
    if row != layout.row_length:
        raise ValueError(f"the mask describes {layout.row_length} tokens, the sequence has {row}")
    plan = layout.derive("batch_plan", q.device, lambda device: _batch_plan(layout, device))

    def batched(x: Tensor) -> Tensor:
        tokens = x[0].transpose(0, 1)
        picked = tokens[: layout.num_tokens] if plan.gather is None else tokens[plan.gather]
        return picked.reshape(samples, longest, *tokens.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(batched(q), batched(k), batched(v), attn_mask=plan.mask, scale=scale)
    if plan.hidden is not None:
        out = out.masked_fill(plan.hidden, 0.0)
    tokens = out.transpose(1, 2).flatten(0, 1)
    if plan.scatter is not None:
        tokens = tokens[plan.scatter]
    if row > layout.num_tokens:
        tokens = F.pad(tokens, (0, 0, 0, 0, 0, row - layout.num_tokens))
    return tokens[None].transpose(1, 2)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, scale: float, score_mod: ScoreMod | None) -> Tensor:
    """FlexAttention where it can run; dense attention with the same mask where it can't."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cuda" and not isinstance(mask, Tensor):
        block_mask = mask.block_mask(q.device) if isinstance(mask, SequenceLayout) else mask
        return _compiled_flex_attention()(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)
    if not needs_grad and isinstance(mask, BlockMask):
        # Uncompiled: on CPU compiled FlexAttention is wrong at some sizes, and there is no backward at all.
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale)
    dense = _dense(mask, q, k)
    if score_mod is None and dense is not None:
        return _sdpa_bool(q, k, v, dense, scale=scale)
    return reference_attention(q, k, v, dense, scale=scale, score_mod=score_mod)


def _dense(mask: AttentionMask, q: Tensor, k: Tensor) -> Tensor | None:
    if isinstance(mask, SequenceLayout):
        return mask.dense_mask(q.device)
    if isinstance(mask, BlockMask):
        batch, heads = mask.shape[:2]
        return create_mask(mask.mask_mod, batch, heads, q.shape[2], k.shape[2], device=str(q.device))
    return mask
