"""Variable-length attention: samples of any length in one row, no mask, no padding. CUDA and half precision only.

`causal_last` is two calls: all before the last sub-sequence over itself, then the last one, causally, over everything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from flextok.attention.layout import SequenceLayout
from flextok.attention.plan import AttentionPlan

DTYPES = (torch.bfloat16, torch.float16)


class _Tokens(NamedTuple):
    """Some tokens of every sample, gathered from the row."""

    rows: Tensor | None
    """int64 `[tokens]`: their places in the row; None if they are the whole row."""
    starts: Tensor
    """int32 `[samples + 1]`: where each sample begins among them, and how many there are."""
    longest: int
    """At least the length of the longest sample, a multiple of 128: few values to compile a block for."""

    def of(self, x: Tensor) -> Tensor:
        """`[tokens, heads, head_dim]` from `[row, heads, head_dim]`."""
        return x if self.rows is None else x.index_select(0, self.rows)


class _Call(NamedTuple):
    queries: _Tokens
    keys: _Tokens
    is_causal: bool


@dataclass(frozen=True)
class VarlenPlan(AttentionPlan):
    """One call, or two for `causal_last`."""

    calls: tuple[_Call, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        out: Tensor | None = None
        is_grouped = q.shape[1] != k.shape[1]
        for queries, keys, is_causal in self.calls:
            part = varlen_attn(
                queries.of(q).contiguous(),
                keys.of(k).contiguous(),
                keys.of(v).contiguous(),
                queries.starts,
                keys.starts,
                queries.longest,
                keys.longest,
                scale=scale,
                # Causal is aligned to the last key: query i of n among m keys sees the first m - n + i + 1.
                window_size=(-1, 0) if is_causal else (-1, -1),
                enable_gqa=is_grouped,
            )
            assert isinstance(part, Tensor)
            if queries.rows is None:
                out = part
            else:
                out = torch.zeros_like(q) if out is None else out
                out = out.index_copy(0, queries.rows, part)
        return (0.0 * (q + (k + v).sum()) if out is None else out)[None].transpose(1, 2)


def plan_varlen(layout: SequenceLayout, device: torch.device) -> VarlenPlan:
    """The calls of a layout: hidden tokens and padding are in none of them and give zeros."""
    ends, before = layout.visible_lengths, [length - row[-1] for length, row in _rows(layout)]
    if layout.mode == "causal_last":
        spans = [([0] * len(ends), before, before, False), (before, ends, ends, True)]
    else:
        spans = [([0] * len(ends), list(ends), list(ends), layout.mode == "causal")]
    calls = [
        _Call(_tokens(layout, first, stop, device), _tokens(layout, [0] * len(ends), keys, device), is_causal)
        for first, stop, keys, is_causal in spans
        if any(b > a for a, b in zip(first, stop, strict=True))
    ]
    return VarlenPlan(layout, tuple(calls))


def _rows(layout: SequenceLayout) -> Iterator[tuple[int, tuple[int, ...]]]:
    return zip(layout.sample_lengths, layout.lengths, strict=True)


def _tokens(layout: SequenceLayout, first: Sequence[int], stop: Sequence[int], device: torch.device) -> _Tokens:
    """The tokens `[first, stop)` of each sample."""
    lengths = torch.tensor(layout.sample_lengths)
    begin = lengths.cumsum(0) - lengths + torch.tensor(first)
    count = torch.tensor(stop) - torch.tensor(first)
    ends = count.cumsum(0)
    starts = torch.nn.functional.pad(ends, (1, 0))
    total = int(starts[-1])
    rows = None
    if total < layout.row_length:
        rows = (torch.arange(total) + (begin - starts[:-1]).repeat_interleave(count)).to(device, non_blocking=True)
    return _Tokens(rows, starts.to(device, torch.int32, non_blocking=True), -(-int(count.max()) // 128) * 128)
