"""Maskers that know keys by their place alone: per query one range of keys, fixed or moving with the query.

From the ranges follow the dense mask, the columns of a decoding step, a `mask_mod` without any tensor and a block mask,
each without looking at pairs it does not need.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flextok.attention.sparse.config import Number
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import FixedMasker, all_columns, full_like, with_chosen
from flextok.attention.sparse.selection import Selection, nothing_selected


class KeyRange(NamedTuple):
    """Keys `start <= j < stop`; a bound that moves counts from the position of the query, `i + Sk - Sq`."""

    start: int
    stop: int
    start_moves: bool = False
    stop_moves: bool = False

    def bounds(self, position: Any) -> tuple[Any, Any]:
        """The first key and the one behind the last, not cut to the keys there are; of ints or tensors."""
        start = position + self.start if self.start_moves else self.start
        stop = position + self.stop if self.stop_moves else self.stop
        return start, stop

    def covers_all(self, num_queries: int, num_keys: int) -> bool:
        """Whether every query sees every key: the last one has to see the first key, the first one the last."""
        start, _ = self.bounds(num_keys - 1)
        _, stop = self.bounds(num_keys - num_queries)
        return start <= 0 and stop >= num_keys

    def widest(self, num_queries: int, num_keys: int) -> int:
        """No query sees more keys than this; bounds are linear, so the first or the last query has the widest range."""
        ranges = (self.bounds(num_keys - num_queries), self.bounds(num_keys - 1))
        return max(0, min(num_keys, max(stop - start for start, stop in ranges)))


class GeometricMasker(FixedMasker):
    """Adds a range of keys per query, with the value 1."""

    @abstractmethod
    def key_range(self, num_queries: int, num_keys: int) -> KeyRange | None:
        """The range for these lengths, None if it is empty. `KeyRange(0, num_keys)` is every key."""

    @torch.no_grad()
    def add_mask(
        self,
        keys: Tensor,
        queries: Tensor,
        values: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        dropout: Number,
        sparse_meta_data: dict[Any, Any] | None,
        previous_mask: Mask,
        **kwargs: Any,
    ) -> Mask:
        if previous_mask.is_full_mask():
            return previous_mask
        _, _, num_queries, num_keys = self._extract_tensor_dimensions(keys, queries)
        found = self.key_range(num_queries, num_keys)
        if found is None:
            return previous_mask
        if found.covers_all(num_queries, num_keys):
            return full_like(previous_mask)
        start, stop = found.bounds(_positions(queries, num_keys)[:, None])
        key = torch.arange(num_keys, device=keys.device)
        chosen = ((key >= start) & (key < stop)).broadcast_to(num_queries, num_keys)
        return with_chosen(previous_mask, chosen.expand(previous_mask.shape))

    def _select(
        self,
        keys: Tensor,
        queries: Tensor,
        attention_mask: Tensor | None,
        sparse_meta_data: dict[Any, Any] | None,
        previous: Selection,
        **kwargs: Any,
    ) -> Selection:
        _, _, num_queries, num_keys = self._extract_tensor_dimensions(keys, queries)
        found = self.key_range(num_queries, num_keys)
        if found is None:
            return nothing_selected(queries)
        if found.covers_all(num_queries, num_keys):
            return all_columns(queries, keys)
        position = _positions(queries, num_keys)[:, None]
        start, stop = (torch.as_tensor(x, device=keys.device).clamp(0, num_keys) for x in found.bounds(position))
        columns = start + torch.arange(found.widest(num_queries, num_keys), device=keys.device)
        inside = columns < stop
        shape = (*queries.shape[:3], columns.shape[-1])
        probabilities = inside.broadcast_to(num_queries, shape[-1]).float().expand(shape)
        return Selection(columns.broadcast_to(shape[2:]).expand(shape), probabilities)


def _positions(queries: Tensor, num_keys: int) -> Tensor:
    """Place of each query on the axis of keys: queries are its last positions."""
    num_queries = queries.shape[2]
    return torch.arange(num_keys - num_queries, num_keys, device=queries.device)
