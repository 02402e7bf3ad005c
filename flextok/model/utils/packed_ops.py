"""Call a function once for a whole list of samples."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok.model.packed_list import PackedList


def packed_proj(x_list: Sequence[Tensor], proj: Callable[[Tensor], Tensor]) -> PackedList:
    """Apply a function of the last axis to all entries `[1, ..., dim]` in one call."""
    return PackedList.pack(x_list).map(proj)


def packed_call(fn: Callable[[Tensor], Any], x: Tensor | Sequence[Tensor]) -> Any:
    """Call `fn` once on the entries `[1, n_i, dim]` joined along axis 1, and split what it returns, tuples included."""
    if isinstance(x, Tensor):
        return fn(x)
    lengths = [entry.shape[1] for entry in x]
    result = fn(torch.cat(list(x), dim=1))
    if isinstance(result, tuple):
        return tuple(list(part.split(lengths, dim=1)) for part in result)
    return list(result.split(lengths, dim=1))


def element_wise_call(fn: Callable[[Tensor], Any], x: Tensor | Sequence[Tensor]) -> Any:
    """Call `fn` on a tensor, or on each entry of a list; tuples of results become a tuple of lists."""
    if isinstance(x, Tensor):
        return fn(x)
    results = [fn(entry) for entry in x]
    if isinstance(results[0], tuple):
        return tuple(list(part) for part in zip(*results, strict=True))
    return results
