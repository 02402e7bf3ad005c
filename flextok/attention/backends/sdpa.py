"""Scaled dot product attention of torch: runs and is differentiable on every device.

A packed row is run sample by sample in one batch, so that no matrix over the whole row exists: samples of equal length
are views of the row, others are gathered into batches of similar length and padded.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.attention.layout import SequenceLayout
from flextok.attention.plan import AttentionPlan

MAX_RUNS = 4
"""Up to so many groups of equal neighbours get a call each, for instance the two branches of guidance."""
NUM_BATCHES = 4
"""Samples of different lengths are sorted into so many batches, each padded to its longest."""


class _Run(NamedTuple):
    """Neighbours in the row with equal lengths: tokens `[first, first + samples * length)`."""

    first: int
    samples: int
    length: int
    visible: int
    """So many tokens of each sample take part; the others give zeros."""
    mask: Tensor | None
    """Added to the scores, broadcastable to `[samples, heads, visible, visible]`."""
    is_causal: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q, k, v and the result `[row, heads, head_dim]`."""
        num_tokens = self.samples * self.length
        q, k, v = (
            _narrow(x, 0, self.first, num_tokens).unflatten(0, (self.samples, self.length)).transpose(1, 2)
            for x in (q, k, v)
        )
        if self.visible == 0:
            # Not a constant: all three must get a gradient, and be it zero.
            return (0.0 * (q + k + v)).transpose(1, 2).flatten(0, 1)
        q, k, v = (_narrow(x, 2, 0, self.visible) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.is_causal, scale=scale)
        if self.visible < self.length:
            out = F.pad(out, (0, 0, 0, self.length - self.visible))
        return out.transpose(1, 2).flatten(0, 1)


def _narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`x.narrow`, but x itself where that is all of it: the gradient of a view is a copy into zeros."""
    return x if length == x.shape[dim] else x.narrow(dim, start, length)


@dataclass(frozen=True)
class RunsPlan(AttentionPlan):
    """One batch without copies for each of a few runs."""

    runs: tuple[_Run, ...]
    padding: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        outputs = [run.attend(q, k, v, scale) for run in self.runs]
        tokens = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self.padding:
            tokens = F.pad(tokens, (0, 0, 0, 0, 0, self.padding))
        return tokens[None].transpose(1, 2)


@dataclass(frozen=True)
class PaddedPlan(AttentionPlan):
    """The visible tokens in a few padded batches of similar length, gathered from the row and put back."""

    gather: Tensor
    """int64 `[places]`: where the tokens of all batches lie in the row; past the end of a sample, any."""
    masks: tuple[Tensor, ...]
    """For each batch what is added to its scores, `[samples, 1, 1 | longest, longest]`."""
    places: Tensor
    """int64 `[visible tokens]`: where each is among the places."""
    rows: Tensor | None
    """int64 `[visible tokens]`: where each is in the row; None if they are the whole row in order."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        row, sizes = q.shape[2], [(mask.shape[0], mask.shape[-1]) for mask in self.masks]
        q, k, v = (x.squeeze(0).transpose(0, 1).index_select(0, self.gather) for x in (q, k, v))
        batches = zip(*(x.split([n * longest for n, longest in sizes]) for x in (q, k, v)), strict=True)
        outputs = []
        for batch, mask, size in zip(batches, self.masks, sizes, strict=True):
            q, k, v = (x.unflatten(0, size).transpose(1, 2) for x in batch)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        tokens = torch.cat(outputs).index_select(0, self.places)
        if self.rows is not None:
            tokens = tokens.new_zeros(row, *tokens.shape[1:]).index_copy(0, self.rows, tokens)
        return tokens[None].transpose(1, 2)


@dataclass(frozen=True)
class DensePlan(AttentionPlan):
    """Any bool mask broadcastable to `[batch, heads, queries, keys]`, or None."""

    mask: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.mask is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        # Rows without a key are given all keys and zeroed afterwards: some fused kernels return NaN for them.
        visible = self.mask.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask | ~visible, scale=scale)
        return out.masked_fill(~visible, 0.0)


def plan_sdpa(layout: SequenceLayout, device: torch.device, dtype: torch.dtype) -> AttentionPlan:
    """Views of the row where its samples allow it, else a padded batch."""
    groups = [(signature, len(list(group))) for signature, group in groupby(_signatures(layout))]
    if not any(layout.visible_lengths):
        # Nobody sees anything: one run of hidden tokens, whatever samples they are of.
        groups = [(_Signature(layout.num_tokens, 0, 0, 1), 1)]
    if len(groups) <= MAX_RUNS:
        padding = layout.row_length - layout.num_tokens
        return RunsPlan(layout, tuple(_runs(groups, layout.mode, device, dtype)), padding)
    return _padded_plan(layout, device, dtype)


class _Signature(NamedTuple):
    """Samples with the same one can share a batch without padding."""

    length: int
    before_last: int
    visible: int
    last_count: int


def _signatures(layout: SequenceLayout) -> Iterator[_Signature]:
    counts = layout.last_counts or (1,) * len(layout.lengths)
    for row, length, visible, count in zip(
        layout.lengths, layout.sample_lengths, layout.visible_lengths, counts, strict=True
    ):
        yield _Signature(length, length - row[-1], visible, count)


def _runs(groups: list[tuple[_Signature, int]], mode: str, device: torch.device, dtype: torch.dtype) -> Iterator[_Run]:
    first = 0
    for signature, samples in groups:
        mask = _order(signature, device, dtype) if mode == "causal_last" else _bias(signature, device, dtype)
        yield _Run(first, samples, signature.length, signature.visible, mask, is_causal=mode == "causal")
        first += samples * signature.length


def _order(signature: _Signature, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[visible, visible]` for `causal_last`: one call with it beats two calls without on a CPU."""
    hidden = torch.ones(signature.visible, signature.visible, dtype=torch.bool).triu(1)
    hidden[:, : signature.before_last] = False
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).to(device, dtype)


def _bias(signature: _Signature, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """`[1, visible]`: log(count) for the last key; None if it counts once."""
    if signature.last_count == 1:
        return None
    bias = torch.zeros(1, signature.visible, dtype=torch.float64)
    bias[:, -1] = math.log(signature.last_count)
    return bias.to(device, dtype)


def _padded_plan(layout: SequenceLayout, device: torch.device, dtype: torch.dtype) -> PaddedPlan:
    lengths, visible = torch.tensor(layout.sample_lengths), torch.tensor(layout.visible_lengths)
    starts = lengths.cumsum(0) - lengths
    # Samples that see nothing are in no batch: their softmax would be undefined.
    by_length = visible.argsort(stable=True)[int((visible == 0).sum()) :]
    groups = by_length.tensor_split(min(NUM_BATCHES, len(by_length)))
    gathers, masks, rows = zip(*[_batch(layout, starts[g], visible[g], dtype) for g in groups], strict=True)
    # Where each place of the batches lies in the row, -1 for padding.
    in_row = torch.cat(rows)
    order = in_row.argsort(stable=True)[int((in_row < 0).sum()) :]
    whole = len(order) == layout.row_length
    return PaddedPlan(
        layout,
        torch.cat(gathers).to(device, non_blocking=True),
        tuple(mask.to(device, non_blocking=True) for mask in masks),
        order.to(device, non_blocking=True),
        None if whole else in_row[order].to(device, non_blocking=True),
    )


def _batch(
    layout: SequenceLayout, starts: Tensor, visible: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one padded batch, on the CPU: its gather, its mask, and the gather with -1 for padding."""
    place = torch.arange(int(visible.max()))
    inside = place < visible[:, None]
    gather = torch.where(inside, starts[:, None] + place, starts[:, None])
    allowed = inside[:, None, None, :]
    if layout.mode != "full":
        ordered = torch.ones(len(place), len(place), dtype=torch.bool).tril()
        if layout.mode == "causal_last":
            table = layout.table(torch.device("cpu"))
            ordered = ordered | table.before_last[gather][:, None, None, :]
        allowed = allowed & ordered
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    bias = layout.key_bias(torch.device("cpu"), torch.float64)
    if bias is not None:
        mask = mask + bias[gather][:, None, None, :]
    return gather.flatten(), mask.to(dtype), torch.where(inside, gather, -1).flatten()
