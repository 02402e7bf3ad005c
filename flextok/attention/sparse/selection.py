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
