"""The visible tokens of a packed row as batches of equally long samples, without padding.

What sparse attention selects depends on how many keys there are, so a sample must not see another one's length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flextok.attention.key_intervals import visible_up_to
from flextok.attention.layout import SequenceLayout


class SampleGroup(NamedTuple):
    """Samples that are alike: as many visible tokens, under the same mask."""

    samples: tuple[int, ...]
    """Which of the layout's, ascending."""
    length: int
    """Visible tokens of each."""
    seen: tuple[int, ...]
    """Per query, the first key that the mode hides from it."""
    rows: Tensor | None
    """int64 `[samples * length]`: their places in the row; None if they are the whole row."""
    mask: Tensor | None
    """None, bool `[1, 1, length, length]`, or `[1, 1, 1, length]` added to the scores."""

    def of(self, x: Tensor) -> Tensor:
        """`[samples, heads, length, head_dim]` from `[1, heads, row, head_dim]`."""
        tokens = x.squeeze(0).transpose(0, 1)
        tokens = tokens if self.rows is None else tokens.index_select(0, self.rows)
        return tokens.unflatten(0, (len(self.samples), self.length)).transpose(1, 2)


def sample_groups(layout: SequenceLayout, device: torch.device, dtype: torch.dtype) -> list[SampleGroup]:
    """The groups of a layout, made once; samples that see nothing are in none."""
    return layout.derive(f"sample groups {dtype}", device, lambda _: _build(layout, device, dtype))


def put_back(groups: Sequence[SampleGroup], outputs: Sequence[Tensor], like: Tensor) -> Tensor:
    """`[1, heads, row, width]` from one `[samples, length, heads, width]` of each group; zeros for all other tokens.

    `like`, `[1, heads, row, head_dim]`, are the queries.
    """
    row, width = like.shape[2], outputs[0].shape[-1] if outputs else like.shape[-1]
    tokens = None
    for group, output in zip(groups, outputs, strict=True):
        flat = output.flatten(0, 1)
        if group.rows is None:
            tokens = flat
        else:
            tokens = flat.new_zeros(row, like.shape[1], width) if tokens is None else tokens
            tokens = tokens.index_copy(0, group.rows, flat)
    # Where nobody sees anything, queries still get a gradient, and be it zero.
    return 0.0 * like if tokens is None else tokens[None].transpose(1, 2)


def _build(layout: SequenceLayout, device: torch.device, dtype: torch.dtype) -> list[SampleGroup]:
    counts = layout.last_counts or (1,) * len(layout.lengths)
    alike: dict[tuple[int, int, int], list[int]] = {}
    facts = zip(layout.lengths, layout.sample_lengths, layout.visible_lengths, counts, strict=True)
    for sample, (row, length, visible, count) in enumerate(facts):
        if visible:
            border = min(length - row[-1], visible) if layout.mode == "causal_last" else 0
            alike.setdefault((visible, border, count), []).append(sample)
    starts = np.cumsum(layout.sample_lengths) - layout.sample_lengths
    groups = []
    for (visible, border, count), samples in alike.items():
        rows = (starts[samples][:, None] + np.arange(visible)).reshape(-1)
        is_all = len(rows) == layout.row_length
        seen = visible_up_to(layout, np.arange(visible), before_last=border, visible=visible)
        groups.append(
            SampleGroup(
                tuple(samples),
                visible,
                tuple(seen.tolist()),
                None if is_all else torch.from_numpy(rows).to(device, non_blocking=True),
                _mask(layout, seen, count, device, dtype),
            )
        )
    return groups


def _mask(
    layout: SequenceLayout, seen: np.ndarray, count: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    if layout.mode != "full":
        return torch.from_numpy(np.arange(len(seen)) < seen[:, None])[None, None].to(device, non_blocking=True)
    if layout.last_counts is None:
        return None
    bias = torch.zeros(1, 1, 1, len(seen), dtype=torch.float64)
    bias[..., -1] = float(np.log(count))
    return bias.to(device, dtype, non_blocking=True)
