"""The keys that hold a share of the true attention weight. It needs all logits, so saves nothing."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flextok.attention.sparse.config import Number, TopPMaskerConfig
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.scores import logits
from flextok.attention.sparse.top_p import TopPMasker


@dataclass
class OracleTopPMaskerConfig(TopPMaskerConfig):
    """The keys with more than `top_p` of the remaining weight."""


@MaskerRegistry.register(OracleTopPMaskerConfig)
class OracleTopPMasker(TopPMasker):
    """Adds the keys with the largest logits, additive attention mask included, until they hold their share."""

    def scores(
        self,
        queries: Tensor,
        keys: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        sparse_meta_data: dict[Any, Any] | None,
        **kwargs: Any,
    ) -> Tensor:
        return logits(queries, keys, scaling, attention_mask)
