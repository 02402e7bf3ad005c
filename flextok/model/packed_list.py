"""A batch of samples stored as one tensor that still behaves as the list of `[1, ...]` tensors it stands for."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, overload

import torch
from torch import Tensor


class PackedList(Sequence[Tensor]):
    """Immutable sequence of samples in one tensor; indexing gives views.

    Samples of one shape are stored as `[batch, *shape]` (any axis order). Samples of different shapes are stored as
    `[total_tokens, width]`: all axes but the last flattened row-major, one sample after another. Modules work on
    `tensor` with one call for the whole batch; code written for lists indexes and iterates.
    """

    def __init__(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> None:
        """Without `shapes`, `tensor` is `[batch, *shape]`; else `[total_tokens, width]`, and they are the entries'."""
        self._tensor = tensor
        self._shapes = None if shapes is None else tuple(tuple(shape) for shape in shapes)

    @property
    def tensor(self) -> Tensor:
        """All samples: `[batch, *shape]` where they share one shape, else `[total_tokens, width]`."""
        return self._tensor

    @classmethod
    def pack(cls, entries: "Sequence[Tensor] | PackedList") -> "PackedList":
        """Join the entries of a list, each `[1, ..., width]`; a `PackedList` is returned as it is."""
        if isinstance(entries, PackedList):
            return entries
        if len(entries) == 0:
            raise ValueError("a batch must hold at least one sample, got an empty list")
        shapes = [tuple(entry.shape) for entry in entries]
        if shapes[0][0] == 1 and all(shape == shapes[0] for shape in shapes):
            return cls(entries[0] if len(entries) == 1 else torch.cat(list(entries)))
        if len({shape[-1] for shape in shapes}) > 1:
            raise ValueError(f"samples of one batch must share their last axis, got shapes {shapes}")
        return cls(torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in entries]), shapes)

    @classmethod
    def pack_if_uniform(cls, entries: Sequence[Tensor]) -> Sequence[Tensor]:
        """Join entries of one shape; others come back as they are, for ops that need each sample's own axes."""
        if isinstance(entries, PackedList) or len({entry.shape for entry in entries}) != 1:
            return entries
        return cls.pack(entries)

    @property
    def is_uniform(self) -> bool:
        """True if all samples share one shape, so that `tensor` is `[batch, *shape]`."""
        return self._shapes is None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each entry, its leading 1 included."""
        if self._shapes is not None:
            return self._shapes
        return ((1, *self.tensor.shape[1:]),) * self.tensor.shape[0]

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Per sample, the product of all axes but the last."""
        return tuple(prod(shape[:-1]) for shape in self.shapes)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "PackedList":
        """Apply a function of the last axis (a projection, a norm) to all samples in one call."""
        tensor = fn(self.tensor)
        if self._shapes is None:
            return PackedList(tensor)
        return PackedList(tensor, [(*shape[:-1], tensor.shape[-1]) for shape in self._shapes])

    def prefixes(self, lengths: Sequence[int]) -> "PackedList":
        """The first `lengths[i]` tokens of each entry `[1, n, width]`, in one gather."""
        starts = torch.tensor([0, *self.num_tokens[:-1]]).cumsum(0)
        rows = offset_ranges(starts, torch.tensor(lengths)).to(self.tensor.device, non_blocking=True)
        tokens = self.tensor.reshape(-1, self.tensor.shape[-1]).index_select(0, rows)
        return PackedList(tokens, [(1, length, tokens.shape[-1]) for length in lengths])

    def repeat_rows(self, rows: Tensor) -> Tensor:
        """Row i of `[batch, width]`, shaped so that it broadcasts over all positions of sample i in `tensor`."""
        if self._shapes is None:
            return rows.view(rows.shape[0], *(1,) * (self.tensor.ndim - 2), rows.shape[-1])
        repeats = torch.tensor(self.num_tokens).to(rows.device, non_blocking=True)
        return rows.repeat_interleave(repeats, dim=0, output_size=sum(self.num_tokens))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if self._shapes is None and isinstance(index, int):
            return self.tensor[range(len(self))[index]][None]
        return tuple(self)[index]

    def __len__(self) -> int:
        return self.tensor.shape[0] if self._shapes is None else len(self._shapes)

    def __iter__(self) -> Iterator[Tensor]:
        if self._shapes is None:
            return iter(self.tensor.split(1))
        parts = zip(self.tensor.split(list(self.num_tokens)), self._shapes, strict=True)
        return (part.view(shape) for part, shape in parts)

    def __repr__(self) -> str:
        return f"PackedList({len(self)} samples, {list(self.shapes[:1] if self.is_uniform else self.shapes)})"


def offset_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """`starts[i], starts[i] + 1, ..` of `lengths[i]` numbers for each i, one after another; int64 on the CPU."""
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)


def repeat_batch(value: Any, batch: int, times: int) -> Any:
    """The dictionary value of a batch repeated `times` times; what is not per sample comes back as it is.

    Per sample are sequences of `batch` entries (strings excepted) and tensors whose leading axis is `batch`.
    """
    if isinstance(value, PackedList):
        if len(value) != batch:
            return value
        shapes = None if value.is_uniform else value.shapes * times
        return PackedList(value.tensor.repeat(times, *(1,) * (value.tensor.ndim - 1)), shapes)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == batch:
        return list(value) * times
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return value.repeat(times, *(1,) * (value.ndim - 1))
    return value
