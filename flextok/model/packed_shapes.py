"""Where the sub-sequences of each sample lie in a packed row, and how they are put back."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from flextok.model.packed_list import PackedList, offset_ranges


class CutShape(tuple[int, ...]):
    """Shape of a sub-sequence of which fewer tokens were packed than it has.

    It is restored to the shape `full`: up to `visible` tokens the packed ones, the last of them repeated; then zeros.
    """

    full: tuple[int, ...]
    visible: int

    @classmethod
    def of(cls, packed: int, *, full: Sequence[int], visible: int) -> "CutShape":
        shape = cls((packed,))
        shape.full, shape.visible = tuple(full), visible
        return shape

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and isinstance(other, CutShape) and vars(self) == vars(other)

    __hash__ = tuple.__hash__


class _Restored(NamedTuple):
    rows: Tensor
    """int64 `[restored tokens]`: the place of each in the packed row."""
    alive: Tensor | None
    """bool `[restored tokens]`: False gives zeros; None if all are alive."""


class PackedShapes(list[list[Sequence[int]]]):
    """Per sample, the shape of each packed sub-sequence without batch and channel axes.

    What a packer writes and an unpacker reads; index tensors are made once and shared by packer and unpackers.
    """

    def __init__(self, shapes: Iterable[Iterable[Sequence[int]]]) -> None:
        super().__init__(list(sample) for sample in shapes)
        self.lengths = [[prod(shape) for shape in sample] for sample in self]
        self.is_cut = any(isinstance(shape, CutShape) for sample in self for shape in sample)
        self.is_plain = not self.is_cut and all(sample == self[0] for sample in self)
        self._restored: dict[tuple[int, torch.device], _Restored] = {}

    def __eq__(self, other: object) -> bool:
        # Asked from both sides: a plain shape takes a cut one of as many packed tokens for its equal.
        return isinstance(other, list) and super().__eq__(other) and list.__eq__(other, self)

    def _starts(self) -> Tensor:
        """int64 `[samples, sub-sequences]`."""
        lengths = torch.tensor(self.lengths)
        return (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)

    def order(self, device: torch.device, *, padding: int) -> Tensor:
        """For each place in the row the token that belongs there, of all sub-sequences one after another.

        int64 `[row]`; `padding` places at the end ask for one token more.
        """
        starts, lengths = self._starts(), torch.tensor(self.lengths)
        places = torch.cat([offset_ranges(starts[:, j], lengths[:, j]) for j in range(lengths.shape[1])])
        order = torch.full((len(places) + padding,), len(places))
        order[places] = torch.arange(len(places))
        return order.to(device, non_blocking=True)

    def restore(self, j: int, row: Tensor) -> PackedList:
        """Sub-sequence j of all samples out of the row `[tokens, width]`, entries `[1, *shape, width]`."""
        shapes = [shape.full if isinstance(shape, CutShape) else tuple(shape) for shape in (s[j] for s in self)]
        if (j, row.device) not in self._restored:
            self._restored[j, row.device] = self._restored_rows(j, row.device)
        rows, alive = self._restored[j, row.device]
        tokens = row.index_select(0, rows)
        if alive is not None:
            tokens = torch.where(alive[:, None], tokens, 0.0)
        if len(set(shapes)) == 1:
            return PackedList(tokens.view(len(shapes), *shapes[0], -1))
        return PackedList(tokens, [(1, *shape, tokens.shape[-1]) for shape in shapes])

    def _restored_rows(self, j: int, device: torch.device) -> _Restored:
        mine = [_as_cut(sample[j]) for sample in self]
        packed = torch.tensor([shape[0] for shape in mine])
        full = torch.tensor([prod(shape.full) for shape in mine])
        visible = torch.tensor([shape.visible for shape in mine])
        position = offset_ranges(torch.zeros_like(full), full)
        inside = position.minimum((packed - 1).clamp(min=0).repeat_interleave(full))
        rows = inside + self._starts()[:, j].repeat_interleave(full)
        alive = position < visible.repeat_interleave(full)
        # A sub-sequence of which nothing was packed may lie at the very end of the row.
        rows = torch.where(alive, rows, 0)
        return _Restored(
            rows.to(device, non_blocking=True), None if alive.all() else alive.to(device, non_blocking=True)
        )


def _as_cut(shape: Sequence[int]) -> CutShape:
    """A shape of which everything was packed, seen as one that was cut."""
    if isinstance(shape, CutShape):
        return shape
    num_tokens = prod(shape)
    return CutShape.of(num_tokens, full=shape, visible=num_tokens)
