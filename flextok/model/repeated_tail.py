"""Token lists that end in equal tokens, as evaluation has them: mask tokens after nested dropout, the null condition.

Equal tokens without a position stay equal in every layer of a trunk without order, so one of them is enough.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flextok.model.packed_list import PackedList, offset_ranges


class RepeatedTail(PackedList):
    """Entries `[1, n, width]` of which only the distinct tokens are stored; to readers of lists it is the whole list.

    Entry i is the tokens of `stored[i]`, the last of which comes `counts[i]` times.
    """

    def __init__(self, stored: PackedList, counts: Sequence[int]) -> None:
        self.stored = stored
        self.counts = tuple(counts)
        self.lengths = tuple(n - 1 + count for n, count in zip(stored.num_tokens, self.counts, strict=True))
        shapes = [(1, length, stored.tensor.shape[-1]) for length in self.lengths]
        super().__init__(stored.tensor, None if len(set(self.lengths)) == 1 else shapes)
        self._full: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The whole list, all tokens repeated; made when somebody asks for it."""
        if self._full is None:
            stored, full = torch.tensor(self.stored.num_tokens), torch.tensor(self.lengths)
            position = offset_ranges(torch.zeros_like(full), full)
            position = position.minimum((stored - 1).repeat_interleave(full))
            index = position + (stored.cumsum(0) - stored).repeat_interleave(full)
            width = self._tensor.shape[-1]
            tokens = self._tensor.reshape(-1, width).index_select(0, index.to(self._tensor.device, non_blocking=True))
            self._full = tokens if self._shapes is not None else tokens.view(len(full), -1, width)
        return self._full

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple((1, length, self._tensor.shape[-1]) for length in self.lengths)

    def __len__(self) -> int:
        return len(self.counts)


def replace_tails(entries: PackedList, keep: Sequence[int], fill: Tensor) -> PackedList:
    """Entries `[1, n, width]` with the tokens at index >= `keep[i]` replaced by `fill` `[width]`, not copied out."""
    stored, counts, full = distinct(entries)
    if any(n - count < k < n for k, n, count in zip(keep, full, counts, strict=True)):
        # The cut goes through equal tokens: two runs of them cannot be counted.
        stored, counts, full = distinct(PackedList(entries.tensor, None if entries.is_uniform else entries.shapes))
    cut = [k < n for k, n in zip(keep, full, strict=True)]
    if not any(cut):
        return entries
    lengths = [k + 1 if c else n for k, c, n in zip(keep, cut, stored.num_tokens, strict=True)]
    kept = stored.prefixes(lengths)
    replaced = torch.zeros(sum(lengths), dtype=torch.bool)
    replaced[torch.tensor(lengths).cumsum(0)[torch.tensor(cut)] - 1] = True
    tokens = torch.where(replaced.to(kept.tensor.device)[:, None], fill.to(kept.tensor.dtype), kept.tensor)
    new_counts = [n - k if c else count for k, c, n, count in zip(keep, cut, full, counts, strict=True)]
    return RepeatedTail(PackedList(tokens, kept.shapes), new_counts)


def distinct(entries: PackedList) -> tuple[PackedList, tuple[int, ...], tuple[int, ...]]:
    """The stored tokens, how often the last of each sample counts, and the length of each whole list."""
    if isinstance(entries, RepeatedTail):
        return entries.stored, entries.counts, entries.lengths
    return entries, (1,) * len(entries), entries.num_tokens
