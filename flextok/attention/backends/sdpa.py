"""Scaled dot product attention of torch: runs and is differentiable on every device.

A packed row is run sample by sample in one batch, so that no matrix over the whole row exists: samples of equal length
are views of the row, others are gathered and padded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.attention.layout import SequenceLayout
from flextok.attention.plan import AttentionPlan
from flextok.attention.reference import visible_keys

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
            return (0.0 * (q + (k + v).sum())).transpose(1, 2).flatten(0, 1)
        q, k, v = (_first(x, 2, visible) for x in (q, k, v))
        out = _sdpa(q, k, v, self.mask, scale, is_causal=self.is_causal)
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
        outputs = [_sdpa(q, k, v, mask, scale) for q, k, v, mask in batches]
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

    def batches(self, x: Tensor) -> list[Tensor]:
        """`[1, heads, row, head_dim]` to one `[samples, heads, longest, head_dim]` for each batch."""
        cells = x.squeeze(0).transpose(0, 1).index_select(0, self.gather)
        parts = cells.split([shape.numel() for shape in self.shapes])
        return [part.unflatten(0, shape.shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]


@dataclass(frozen=True)
class DensePlan(AttentionPlan):
    """Any mask broadcastable to `[batch, heads, queries, keys]`, bool or added to the scores, or None."""

    mask: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.mask is None:
            return _sdpa(q, k, v, None, scale)
        # Rows without a key are given all keys and zeroed afterwards: some fused kernels return NaN for them.
        visible = visible_keys(self.mask).any(-1, keepdim=True)
        if self.mask.dtype == torch.bool:
            mask = self.mask | ~visible
        else:
            mask = self.mask.to(q.dtype).masked_fill(~visible, 0.0)
        return _sdpa(q, k, v, mask, scale).masked_fill(~visible, 0.0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


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
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).to(device, dtype, non_blocking=True)


def _bias(signature: _Signature, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[1, visible]`: log(count) for the last key."""
    bias = torch.zeros(1, signature.visible, dtype=torch.float64)
    bias[:, -1:] = math.log(signature.last_count)
    return bias.to(device, dtype, non_blocking=True)


def _padded_plan(
    layout: SequenceLayout, device: torch.device, dtype: torch.dtype, subsequences: Sequence[int] | None = None
) -> AttentionPlan:
    """With `subsequences`, queries are their tokens alone, one after another as in the row."""
    keys = _cells(layout, np.arange(layout.num_tokens))
    queries, num_queries = keys, layout.row_length
    if subsequences is not None:
        tokens = layout.rows_of(subsequences, torch.device("cpu")).numpy()
        queries, num_queries = _cells(layout, tokens), len(tokens)
    is_token = np.zeros(keys.token.shape, dtype=bool)
    is_token[keys.cells] = True
    visible = [some[:, None, None, :] for some in keys.split(is_token)]
    if layout.mode != "full":
        before_last = layout.table(torch.device("cpu")).before_last.numpy()[keys.token]
        parts = zip(visible, keys.split(keys.place), keys.split(before_last), queries.split(queries.place), strict=True)
        visible = []
        for is_key, key, is_before, query in parts:
            earlier = key[:, None, None, :] <= query[:, None, :, None]
            if layout.mode == "causal_last":
                earlier |= is_before[:, None, None, :]
            visible.append(earlier & is_key)
    masks = [torch.zeros(some.shape, dtype=dtype).masked_fill_(torch.from_numpy(~some), -math.inf) for some in visible]
    bias = layout.key_bias(torch.device("cpu"), torch.float64)
    if bias is not None:
        biases = [torch.from_numpy(part).to(dtype) for part in keys.split(bias.numpy()[keys.token])]
        masks = [mask + part[:, None, None, :] for mask, part in zip(masks, biases, strict=True)]
    moved = _padded(keys, layout.row_length, device)
    return PaddedPlan(
        layout,
        moved if queries is keys else _padded(queries, num_queries, device),
        moved,
        tuple(mask.to(device, non_blocking=True) for mask in masks),
    )


class _Cells(NamedTuple):
    """Padded batches, whose cells are counted through. NumPy: with tensors the small operations take far longer."""

    shapes: list[tuple[int, int]]
    """Per batch `(samples, longest)`."""
    token: np.ndarray
    """`[cells]`: which of the tokens is there; 0 in empty cells."""
    place: np.ndarray
    """`[cells]`: the place of that token in its sample."""
    rows: np.ndarray
    """`[visible tokens]`: which tokens are visible."""
    cells: np.ndarray
    """`[visible tokens]`: the cell of each."""

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """`[cells]` as one `[samples, longest]` for each batch."""
        ends = np.cumsum([samples * longest for samples, longest in self.shapes])
        return [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), self.shapes, strict=True)]


def _cells(layout: SequenceLayout, tokens: np.ndarray) -> _Cells:
    """The visible ones of `tokens`, ascending places in the layout, in two batches: of the shorter half of the samples
    and of the longer.

    Samples that see nothing are in none: their softmax would be undefined.
    """
    lengths, visible = np.array(layout.sample_lengths), np.array(layout.visible_lengths)
    ends = lengths.cumsum()
    sample = np.searchsorted(ends, tokens, side="right")
    place = tokens - (ends - lengths)[sample]
    rows = np.flatnonzero(place < visible[sample])
    sample, place = sample[rows], place[rows]
    counts = np.bincount(sample, minlength=len(lengths))
    column = np.arange(len(rows)) - (counts.cumsum() - counts)[sample]

    by_length = visible.argsort(kind="stable")[np.count_nonzero(visible == 0) :]
    half = -(-len(by_length) // 2)
    shapes, num_cells, first_cell = [], 0, np.zeros_like(counts)
    for samples in filter(len, (by_length[:half], by_length[half:])):
        shape = len(samples), int(counts[samples].max())
        first_cell[samples] = num_cells + shape[1] * np.arange(len(samples))
        shapes.append(shape)
        num_cells += shape[0] * shape[1]
    cells = first_cell[sample] + column
    token_of_cell, place_of_cell = np.zeros((2, num_cells), dtype=np.int64)
    token_of_cell[cells], place_of_cell[cells] = rows, place
    return _Cells(shapes, token_of_cell, place_of_cell, rows, cells)


def _padded(cells: _Cells, row_length: int, device: torch.device) -> _Padded:
    shapes = tuple(torch.empty(shape, dtype=torch.bool, device=device) for shape in cells.shapes)
    whole = len(cells.rows) == row_length
    gather, index, rows = (
        None if array is None else torch.from_numpy(array).to(device, non_blocking=True)
        for array in (cells.token, cells.cells, None if whole else cells.rows)
    )
    assert gather is not None
    assert index is not None
    return _Padded(shapes, gather, index, rows)
