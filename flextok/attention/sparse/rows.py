"""Compressed rows: the entries of a mask above 0, row by row. All leading dimensions count as rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Entries above 0, ascending by row and column."""

    indices: Tensor
    """int64 `(entries,)`: flat positions, `row * n + column`."""
    ptr: Tensor
    """int64 `(rows + 1,)`: where each row begins among the entries."""
    data: Tensor
    """`(entries,)`: the values."""


def rows_of(shape: Sequence[int], rows: Rows) -> Rows:
    """`rows` put in order, without entries of 0; ValueError if they are not the rows of a mask of `shape`."""
    num_columns = shape[-1]
    num_rows = torch.Size(shape[:-1]).numel()
    indices, ptr, data = rows
    if indices.ndim != 1 or data.shape != indices.shape:
        raise ValueError(f"data has shape {list(data.shape)}, indices {list(indices.shape)}; valid: both [entries]")
    if ptr.shape != (num_rows + 1,) or int(ptr[0]) != 0 or int(ptr[-1]) != len(indices) or (ptr.diff() < 0).any():
        raise ValueError(f"ptr={ptr.tolist()[:8]}...; valid: {num_rows + 1} rising numbers from 0 to {len(indices)}")
    row = torch.arange(num_rows, device=indices.device).repeat_interleave(ptr.diff())
    outside = (indices < row * num_columns) | (indices >= (row + 1) * num_columns)
    if outside.any():
        place = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"indices holds {int(indices[place])} in row {int(row[place])}; valid there: "
            f"{int(row[place]) * num_columns} to {(int(row[place]) + 1) * num_columns - 1}"
        )
    indices, order = indices.sort()
    twice = indices[1:] == indices[:-1]
    if twice.any():
        raise ValueError(f"indices holds {int(indices[1:][twice][0])} twice; valid: each pair once")
    return _rows_from_sorted(indices, data[order], num_rows, num_columns)


def rows_from_columns(columns: Tensor, values: Tensor, num_columns: int) -> Rows:
    """From column numbers `(..., k)`, -1 for none, and their values."""
    width = columns.shape[-1]
    flat = columns.long().reshape(-1, width)
    start = torch.arange(len(flat), device=columns.device)[:, None] * num_columns
    is_entry = flat >= 0
    order = torch.where(is_entry, flat, num_columns).argsort(-1)
    flat, values, is_entry = (x.gather(-1, order) for x in (flat, values.reshape(-1, width), is_entry))
    ptr = torch.nn.functional.pad(is_entry.sum(-1).cumsum(0), (1, 0))
    return Rows((flat + start)[is_entry], ptr, values[is_entry])


def rows_from_dense(dense: Tensor) -> Rows:
    """The entries above 0 of `(..., n)`."""
    indices = dense.reshape(-1).nonzero()[:, 0]
    num_columns = dense.shape[-1]
    num_rows = dense.numel() // num_columns if num_columns else torch.Size(dense.shape[:-1]).numel()
    return _rows_from_sorted(indices, dense.reshape(-1)[indices], num_rows, num_columns)


def dense_from_rows(rows: Rows, shape: Sequence[int]) -> Tensor:
    """A new tensor of `shape`."""
    flat = torch.zeros(torch.Size(shape).numel(), dtype=rows.data.dtype, device=rows.data.device)
    return flat.put_(rows.indices, rows.data).reshape(tuple(shape))


def merged_rows(first: Rows, second: Rows, num_columns: int) -> Rows:
    """The union of entries of masks of one shape; a value that both have is `min(1, a + b)`."""
    indices, place = torch.cat([first.indices, second.indices]).unique(return_inverse=True)
    data = torch.zeros(len(indices), dtype=first.data.dtype, device=first.data.device)
    data = data.index_add(0, place, torch.cat([first.data, second.data])).clamp_(max=1)
    return _rows_from_sorted(indices, data, len(first.ptr) - 1, num_columns)


def _rows_from_sorted(indices: Tensor, data: Tensor, num_rows: int, num_columns: int) -> Rows:
    is_entry = data > 0
    indices, data = indices[is_entry], data[is_entry]
    borders = torch.arange(num_rows + 1, device=indices.device) * num_columns
    return Rows(indices, torch.searchsorted(indices, borders), data)
