"""`Selection`: chosen columns per query, for attention that reads nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """Per query, the keys that it attends to and the probability with which each was to be chosen."""

    columns: Tensor
    """int64 `(B, H, Sq, k)`: column numbers, each at most once in a row; anything where the probability is 0."""
    probabilities: Tensor
    """float32 `(B, H, Sq, k)`; 0 is padding."""

    def is_everything(self, num_keys: int) -> bool:
        """Whether all of `num_keys` keys are chosen with certainty in every row."""
        # Rarely as wide as that, so the values are rarely looked at.
        return self.columns.shape[-1] >= num_keys and bool(((self.probabilities == 1).sum(-1) == num_keys).all())

    def contains(self, num_keys: int) -> Tensor:
        """Which of `num_keys` keys are chosen, bool `(B, H, Sq, num_keys)`."""
        # Padding is written to a column behind the last, for its number may be that of a chosen one.
        place = torch.where(self.probabilities > 0, self.columns, num_keys)
        marks = torch.zeros(*self.columns.shape[:-1], num_keys + 1, dtype=torch.bool, device=self.columns.device)
        return marks.scatter_(-1, place, True)[..., :num_keys]


def nothing_selected(queries: Tensor) -> Selection:
    """No column for any of the queries `(B, H, Sq, D)`."""
    shape = (*queries.shape[:3], 0)
    device = queries.device
    return Selection(torch.empty(shape, dtype=torch.long, device=device), torch.empty(shape, device=device))


def merge_selections(first: Selection, second: Selection) -> Selection:
    """The union; the probability of a column that both have is `min(1, a + b)`."""
    if first.columns.shape[-1] == 0 or second.columns.shape[-1] == 0:
        return second if first.columns.shape[-1] == 0 else first
    columns = torch.cat([first.columns, second.columns], -1)
    probabilities = torch.cat([first.probabilities, second.probabilities], -1)
    # Padding goes behind all columns, where it never equals one.
    key = torch.where(probabilities > 0, columns, torch.iinfo(torch.int64).max)
    key, order = key.sort(-1)
    probabilities = probabilities.gather(-1, order)
    twice = key[..., 1:] == key[..., :-1]
    # A column occurs at most twice, once from each side: the first takes all, the second becomes padding.
    probabilities[..., :-1] += probabilities[..., 1:] * twice
    probabilities[..., 1:].masked_fill_(twice, 0)
    return Selection(columns.gather(-1, order), probabilities.clamp_(max=1))


def columns_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that are True in each row of `chosen` `(..., n)`, and which are entries: the rest, 0, is padding."""
    lengths = chosen.sum(-1).flatten()
    longest = int(lengths.max()) if len(lengths) else 0
    row, column = chosen.flatten(0, -2).nonzero().unbind(-1)
    starts = lengths.cumsum(0) - lengths
    columns = torch.zeros(len(lengths), longest, dtype=torch.long, device=chosen.device)
    columns[row, torch.arange(len(row), device=chosen.device) - starts[row]] = column
    is_entry = torch.arange(longest, device=chosen.device) < lengths[:, None]
    shape = (*chosen.shape[:-1], longest)
    return columns.reshape(shape), is_entry.reshape(shape)


def rows_at(x: Tensor, columns: Tensor) -> Tensor:
    """Rows `(B, Hkv, R, k, W)` of x `(B, Hkv, Sk, W)` at columns `(B, Hkv, R, k)`."""
    batch, heads, num_keys, width = x.shape
    if x.is_contiguous():
        start = torch.arange(batch * heads, device=x.device).reshape(batch, heads, 1, 1) * num_keys
        rows = x.view(-1, width).index_select(0, (columns + start).reshape(-1))
        return rows.reshape(*columns.shape, width)
    # A slice of a larger cache: reading through its strides is slower, but copying all of it would be slower still.
    b = torch.arange(batch, device=x.device).reshape(-1, 1, 1, 1)
    h = torch.arange(heads, device=x.device).reshape(1, -1, 1, 1)
    return x[b, h, columns]
