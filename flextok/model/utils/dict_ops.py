"""Small operations on entries of the data dictionary."""

from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn

from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList


def channels_first_to_last(x: Tensor) -> Tensor:
    """`[b, c, ...]` -> `[b, ..., c]`."""
    return x.movedim(1, -1)


def channels_last_to_first(x: Tensor) -> Tensor:
    """`[b, ..., c]` -> `[b, c, ...]`."""
    return x.movedim(-1, 1)


def sum_tensors(*tensors: Tensor) -> Tensor:
    """Their sum, of shapes that broadcast."""
    return reduce(torch.add, tensors)


def multiply_tensors(*tensors: Tensor) -> Tensor:
    """Their product, of shapes that broadcast."""
    return reduce(torch.mul, tensors)


def concat_tensors(*tensors: Tensor, dim: int = -1) -> Tensor:
    """One after another along `dim`."""
    return torch.cat(tensors, dim=dim)


# These treat every sample of `[batch, ...]` alike, so one call serves a whole uniform batch.
_BATCHED_OPS = frozenset({channels_first_to_last, channels_last_to_first})


class DictKeyFilter(nn.Module):
    """Return a new dictionary with only the allowed keys, or without the blocked ones."""

    def __init__(self, allowed_keys: Sequence[str] | None = None, blocked_keys: Sequence[str] | None = None) -> None:
        super().__init__()
        if (allowed_keys is None) == (blocked_keys is None):
            raise ValueError(f"give exactly one of allowed_keys ({allowed_keys}) and blocked_keys ({blocked_keys})")
        self.allowed_keys = None if allowed_keys is None else frozenset(allowed_keys)
        self.blocked_keys = frozenset(blocked_keys or ())

    def forward(self, data_dict: DataDict) -> DataDict:
        if self.allowed_keys is None:
            return {key: value for key, value in data_dict.items() if key not in self.blocked_keys}
        return {key: value for key, value in data_dict.items() if key in self.allowed_keys}


class PerSampleOp(nn.Module):
    """Apply a function of one tensor to every entry of a list."""

    def __init__(self, read_key: str, write_key: str, per_sample_op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read_key, self.write_key = read_key, write_key
        if isinstance(per_sample_op, partial):
            # Hydra's partials look at their target anew in every call.
            per_sample_op = partial(per_sample_op.func, *per_sample_op.args, **per_sample_op.keywords)
        self.per_sample_op = per_sample_op

    @property
    def _is_batched(self) -> bool:
        op = self.per_sample_op
        return (op.func if isinstance(op, partial) else op) in _BATCHED_OPS

    def forward(self, data_dict: DataDict) -> DataDict:
        entries = PackedList.pack_if_uniform(data_dict[self.read_key])
        if self._is_batched and isinstance(entries, PackedList) and entries.is_uniform:
            data_dict[self.write_key] = PackedList(self.per_sample_op(entries.tensor))
        else:
            data_dict[self.write_key] = [self.per_sample_op(entry) for entry in entries]
        return data_dict


class PerSampleReducer(nn.Module):
    """Combine the entries of several lists sample by sample.

    Raises:
        KeyError: a key is missing.
        TypeError: a value is no list.
        ValueError: the lists differ in length.
    """

    def __init__(self, read_keys: Sequence[str], write_key: str, per_sample_op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.read_keys, self.write_key = list(read_keys), write_key
        self.per_sample_op = per_sample_op

    def forward(self, data_dict: DataDict) -> DataDict:
        for key in self.read_keys:
            if key not in data_dict:
                raise KeyError(key)
            if not isinstance(data_dict[key], list | tuple | PackedList):
                raise TypeError(f"{key!r} must hold a list of tensors, got {type(data_dict[key]).__name__}")
        lists = [data_dict[key] for key in self.read_keys]
        if len({len(entries) for entries in lists}) > 1:
            raise ValueError(
                f"lists differ in length: { {k: len(v) for k, v in zip(self.read_keys, lists, strict=True)} }"
            )
        data_dict[self.write_key] = [self.per_sample_op(*entries) for entries in zip(*lists, strict=True)]
        return data_dict
