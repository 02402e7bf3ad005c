"""Base of maskers that select the keys which hold a share of the weight: a subclass gives the logits."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flextok.attention.sparse.config import Number, TopPMaskerConfig
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import FixedMasker, candidates, full_like, with_chosen
from flextok.attention.sparse.scores import check_shapes


class TopPMasker(FixedMasker):
    """Adds, per query, the best keys until they hold more than `top_p` of the weight that earlier maskers left."""

    config: TopPMaskerConfig

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
        """Logits `(B, H, Sq, Sk)`, whose softmax is the weight."""

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
        if self.config.top_p == 1:
            return full_like(previous_mask)
        scores = self.scores(queries, keys, attention_mask, scaling, sparse_meta_data, **kwargs)
        return with_chosen(
            previous_mask, heaviest(scores, self.config.top_p, candidates(previous_mask, attention_mask))
        )


def heaviest(
    scores: Float[Tensor, "*rows n"], share: float, is_candidate: Bool[Tensor, "*rows n"]
) -> Bool[Tensor, "*rows n"]:
    """Per row the candidates with the largest softmax weight that together hold more than `share`, and their equals."""
    weights = scores.masked_fill(~is_candidate, float("-inf")).softmax(-1)
    ordered, _ = weights.sort(-1, descending=True)
    # One key more than there are cumulative sums up to the share; all of them where none is above it.
    rank = (ordered.cumsum(-1) <= share).sum(-1, keepdim=True).clamp_(max=max(weights.shape[-1] - 1, 0))
    # Rows without candidates have NaN weights, which are not at least anything.
    return (weights >= ordered.gather(-1, rank)) & is_candidate
