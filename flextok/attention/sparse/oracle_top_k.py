"""The keys with the largest logits: what any approximate top-k is compared with. It needs all of them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flextok.attention.sparse.config import Number, TopKMaskerConfig
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.scores import logits
from flextok.attention.sparse.top_k import TopKMasker


@dataclass
class OracleTopKConfig(TopKMaskerConfig):
    """The `heavy_size` keys with the largest logits."""


@MaskerRegistry.register(OracleTopKConfig)
class OracleTopK(TopKMasker):
    """Adds the keys with the largest logits, additive attention mask included."""

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
