"""Base of maskers that select the keys with the largest scores: a subclass gives the scores, the rule is here."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from flextok.attention.sparse.config import Number, TopKMaskerConfig, num_keys_of
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import FixedMasker, candidates, full_like, with_chosen
from flextok.attention.sparse.scores import check_shapes


class TopKMasker(FixedMasker):
    """Adds, per query, the `heavy_size` best keys among those that are inactive and allowed, all if there are fewer."""

    config: TopKMaskerConfig

    @abstractmethod
    def scores(
        self,
        queries: Tensor,
        keys: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        sparse_meta_data: dict[Any, Any] | None,
        **kwargs: Any,
    ) -> Tensor:
        """How good each key is, `(B, H, Sq, Sk)`; the attention mask may be in it or not."""

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
        check_shapes(queries, keys)
        num_keys = keys.shape[2]
        size = num_keys_of(self.config.heavy_size, num_keys)
        if size >= num_keys:
            return full_like(previous_mask)
        if size == 0:
            return previous_mask
        scores = self.scores(queries, keys, attention_mask, scaling, sparse_meta_data, **kwargs)
        return with_chosen(previous_mask, largest(scores, size, candidates(previous_mask, attention_mask)))


def largest(
    scores: Shaped[Tensor, "*rows n"], k: int, is_candidate: Bool[Tensor, "*rows n"]
) -> Bool[Tensor, "*rows n"]:
    """Per row the k candidates with the largest scores, all if there are fewer; of equal ones the first columns."""
    lowest = float("-inf") if scores.dtype.is_floating_point else torch.iinfo(scores.dtype).min
    scores = scores.masked_fill(~is_candidate, lowest)
    # Not a stable sort: the k-th largest score is found in linear time, and decides all but the keys that have it.
    threshold = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above = scores > threshold
    equal = (scores == threshold) & is_candidate
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def nearest(
    distance: Shaped[Tensor, "*rows n"], k: int, is_candidate: Bool[Tensor, "*rows n"], most: int
) -> Bool[Tensor, "*rows n"]:
    """Per row the k candidates of the smallest distance, 0 to `most`; of equal ones the first columns.

    There are few values, so counting them is quicker than sorting.
    """
    flat = torch.where(is_candidate, distance.int(), most + 1).flatten(0, -2)
    bins = most + 2
    start = torch.arange(len(flat), device=flat.device, dtype=torch.int32)[:, None] * bins
    up_to = torch.bincount((flat + start).flatten(), minlength=len(flat) * bins).reshape(-1, bins).cumsum(-1)
    # The distance of the k-th nearest; one past the last where there are fewer candidates.
    threshold = (up_to[:, :-1] < k).sum(-1, keepdim=True)
    nearer = torch.nn.functional.pad(up_to, (1, 0)).gather(-1, threshold)
    equal = flat == threshold
    chosen = (flat < threshold) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= k - nearer))
    return chosen.reshape(distance.shape) & is_candidate
