"""Every key up to the query itself."""

from dataclasses import dataclass

from flextok.attention.sparse.config import FixedMaskerConfig
from flextok.attention.sparse.geometric import GeometricMasker, KeyRange
from flextok.attention.sparse.registry import MaskerRegistry


@dataclass
class CausalMaskerConfig(FixedMaskerConfig):
    """No options."""


@MaskerRegistry.register(CausalMaskerConfig)
class CausalMasker(GeometricMasker):
    """Adds the keys up to each query. It forbids none: that is the business of the attention mask."""

    config: CausalMaskerConfig

    def key_range(self, num_queries: int, num_keys: int) -> KeyRange | None:
        return KeyRange(0, 1, stop_moves=True)
