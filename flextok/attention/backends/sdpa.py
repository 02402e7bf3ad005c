"""Scaled dot product attention of torch: runs and is differentiable on every device.

A packed row is run sample by sample in one batch, so that no matrix over the whole row exists: samples of equal length
are views of the row, others are gathered and padded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.attention.layout import SequenceLayout
from flextok.attention.plan import AttentionPlan

MAX_RUNS = 2
"""Up to so many groups of equal neighbours get a call each: a uniform batch, or the two branches of guidance."""


class _Run(NamedTuple):
    """Neighbours in the row with equal lengths.

    Sizes are the shapes of tensors, not integers: a compiled block would be compiled anew for other integers.
    """

    tokens: Tensor
    """`[samples, length]`, without content: the tokens of the run."""
    visible: Tensor
    """`[visible]`, without content: so many tokens of each sample take part; the others give zeros."""
    mask: Tensor | None
    """Added to the scores, broadcastable to `[samples, heads, visible, visible]`."""
    is_causal: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q, k, v and the result `[samples * length, heads, head_dim]`."""
        length, visible = self.tokens.shape[1], self.visible.shape[0]
        q, k, v = (x.unflatten(0, self.tokens.shape).transpose(1, 2) for x in (q, k, v))
        if visible == 0:
            # Not a constant: all three must get a gradient, and be it zero.
            return (0.0 * (q + k + v)).transpose(1, 2).flatten(0, 1)
        q, k, v = (_first(x, 2, visible) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.is_causal, scale=scale)
        if visible < length:
            out = F.pad(out, (0, 0, 0, length - visible))
        return out.transpose(1, 2).flatten(0, 1)


def _first(x: Tensor, dim: int, length: int) -> Tensor:
    """The first `length` of x, x itself where that is all of it: the gradient of a view is a copy into zeros."""
    return x if length == x.shape[dim] else x.narrow(dim, 0, length)


@dataclass(frozen=True)
class RunsPlan(AttentionPlan):
    """One batch without copies for each of a few runs; what follows them in the row is padding."""

    runs: tuple[_Run, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        row, sizes = q.shape[2], [run.tokens.numel() for run in self.runs]
        q, k, v = (_first(x.squeeze(0).transpose(0, 1), 0, sum(sizes)) for x in (q, k, v))
        if len(self.runs) == 1:
            tokens = self.runs[0].attend(q, k, v, scale)
        else:
            parts = zip(self.runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
            tokens = torch.cat([run.attend(q, k, v, scale) for run, q, k, v in parts])
        if row > sum(sizes):
            tokens = F.pad(tokens, (0, 0, 0, 0, 0, row - sum(sizes)))
        return tokens[None].transpose(1, 2)


@dataclass(frozen=True)
class PaddedPlan(AttentionPlan):
    """The visible tokens as batches padded to the longest sample of each, gathered from the row and put back.

    Two batches, the shorter samples and the longer ones, pad less than one; three made no training step faster.
    """

    queries: "_Padded"
    keys: "_Padded"
    masks: tuple[Tensor, ...]
    """Per batch, added to the scores, `[samples, 1, 1 | longest of the queries, longest of the keys]`."""

    @property
    def takes_some_queries(self) -> bool:
        return self.queries is not self.keys

    def for_queries_of(self, subsequences: Sequence[int]) -> AttentionPlan:
        assert self.layout is not None
        layout, device, dtype = self.layout, self.masks[0].device, self.masks[0].dtype
        name = f"padded plan {dtype} for queries of {subsequences}"
        return layout.derive(name, device, lambda _: _padded_plan(layout, device, dtype, subsequences))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        length = q.shape[2]
        batches = zip(self.queries.batches(q), self.keys.batches(k), self.keys.batches(v), self.masks, strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale) for q, k, v, mask in batches]
        cells = torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outputs])
        tokens = cells.index_select(0, self.queries.cells)
        if self.queries.rows is not None:
            tokens = tokens.new_zeros(length, *tokens.shape[1:]).index_copy(0, self.queries.rows, tokens)
        return tokens[None].transpose(1, 2)


class _Padded(NamedTuple):
    """Where the visible tokens of a row are in padded batches, whose cells are counted through."""

    shapes: tuple[Tensor, ...]
    """Per batch `[samples, longest]`, without content."""
    gather: Tensor
    """int64 `[cells]`: places in the row; past the end of a sample, any."""
    cells: Tensor
    """int64 `[visible tokens]`: the cell of each."""
    rows: Tensor | None
    """int64 `[visible tokens]`: where each is in the row; None if they are the whole row."""

    def to(self, device: torch.device) -> "_Padded":
        gather, cells = (index.to(device, non_blocking=True) for index in (self.gather, self.cells))
        rows = None if self.rows is None else self.rows.to(device, non_blocking=True)
        return _Padded(tuple(shape.to(device) for shape in self.shapes), gather, cells, rows)

    def split(self, cells: Tensor) -> list[Tensor]:
        """Values of all cells `[cells, ...]` as one `[samples, longest, ...]` for each batch."""
        parts = cells.split([shape.numel() for shape in self.shapes])
        return [part.unflatten(0, shape.shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def batches(self, x: Tensor) -> list[Tensor]:
        """`[1, heads, row, head_dim]` to one `[samples, heads, longest, head_dim]` for each batch."""
        tokens = x.squeeze(0).transpose(0, 1).index_select(0, self.gather)
        return [batch.transpose(1, 2) for batch in self.split(tokens)]


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
        return RunsPlan(layout, tuple(_runs(groups, layout.mode, device, dtype)))
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
    for signature, samples in groups:
        if mode == "causal_last":
            mask: Tensor | None = _order(signature, device, dtype)
        else:
            # Where one of two runs has a bias both get one: fewer kinds of plans to compile a block for.
            has_bias = any(signature.last_count > 1 for signature, _ in groups)
            mask = _bias(signature, device, dtype) if has_bias else None
        tokens = torch.empty(samples, signature.length, dtype=torch.bool, device=device)
        visible = torch.empty(signature.visible, dtype=torch.bool, device=device)
        yield _Run(tokens, visible, mask, is_causal=mode == "causal")


def _order(signature: _Signature, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[visible, visible]` for `causal_last`: one call with it beats two calls without on a CPU."""
    hidden = torch.ones(signature.visible, signature.visible, dtype=torch.bool).triu(1)
    hidden[:, : signature.before_last] = False
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).to(device, dtype)


def _bias(signature: _Signature, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[1, visible]`: log(count) for the last key."""
    bias = torch.zeros(1, signature.visible, dtype=torch.float64)
    bias[:, -1:] = math.log(signature.last_count)
    return bias.to(device, dtype)


def _padded_plan(
    layout: SequenceLayout, device: torch.device, dtype: torch.dtype, subsequences: Sequence[int] | None = None
) -> AttentionPlan:
    """With `subsequences`, queries are their tokens alone, one after another as in the row."""
    keys, place = _padded(layout, torch.arange(layout.num_tokens), layout.row_length)
    queries, query_place = keys, place
    if subsequences is not None:
        tokens = layout.rows_of(subsequences, torch.device("cpu"))
        queries, query_place = _padded(layout, tokens, len(tokens))
    bias = layout.key_bias(torch.device("cpu"), torch.float64)
    scores = torch.full(keys.gather.shape, float("-inf"), dtype=torch.float64)
    scores[keys.cells] = 0.0 if bias is None else bias[keys.gather[keys.cells]]
    masks = [mask[:, None, None, :] for mask in keys.split(scores)]
    if layout.mode != "full":
        before_last = layout.table(torch.device("cpu")).before_last[keys.gather]
        parts = zip(masks, keys.split(place), keys.split(before_last), queries.split(query_place), strict=True)
        masks = []
        for mask, key, is_before, query in parts:
            visible = key[:, None, None, :] <= query[:, None, :, None]
            if layout.mode == "causal_last":
                visible = visible | is_before[:, None, None, :]
            masks.append(torch.where(visible, mask, float("-inf")))
    moved = keys.to(device)
    queries = moved if queries is keys else queries.to(device)
    return PaddedPlan(layout, queries, moved, tuple(mask.to(device, dtype) for mask in masks))


def _padded(layout: SequenceLayout, tokens: Tensor, row_length: int) -> tuple[_Padded, Tensor]:
    """The visible ones of `tokens` of the layout in batches, and for each cell its place in the sample.

    `tokens` are ascending places in the layout, and in the order of the row of `row_length` that is gathered from.
    Samples that see nothing are in no batch: their softmax would be undefined.
    """
    lengths, visible = torch.tensor(layout.sample_lengths), torch.tensor(layout.visible_lengths)
    ends = lengths.cumsum(0)
    sample = torch.bucketize(tokens, ends, right=True)
    place = tokens - (ends - lengths)[sample]
    rows = (place < visible[sample]).nonzero()[:, 0]
    sample, place = sample[rows], place[rows]
    counts = sample.bincount(minlength=len(lengths))
    column = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[sample]

    by_length = visible.argsort(stable=True)[int((visible == 0).sum()) :]
    shapes, num_cells, first_cell = [], 0, torch.zeros_like(counts)
    for samples in by_length.chunk(2):
        shape = len(samples), int(counts[samples].max())
        first_cell[samples] = num_cells + shape[1] * torch.arange(len(samples))
        shapes.append(torch.empty(shape, dtype=torch.bool))
        num_cells += shape[0] * shape[1]
    cells = first_cell[sample] + column
    gather, place_of_cell = torch.zeros(2, num_cells, dtype=torch.long)
    gather[cells], place_of_cell[cells] = rows, place
    whole = len(rows) == row_length
    return _Padded(tuple(shapes), gather, cells, None if whole else rows), place_of_cell
