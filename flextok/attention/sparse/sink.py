"""The first keys of a sequence, which models use as a place to put attention they do not need."""

from dataclasses import dataclass

from flextok.attention.sparse.config import (
    FixedMaskerConfig,
    Given,
    Size,
    checked_size,
    num_keys_of,
)
from flextok.attention.sparse.geometric import GeometricMasker, KeyRange
from flextok.attention.sparse.registry import MaskerRegistry


@dataclass
class SinkMaskerConfig(FixedMaskerConfig):
    """The first `sink_size` keys."""

    sink_size: Given[Size]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sink_size = checked_size("sink_size", self.sink_size)


@MaskerRegistry.register(SinkMaskerConfig)
class SinkMasker(GeometricMasker):
    """Adds the first keys."""

    config: SinkMaskerConfig

    def key_range(self, num_queries: int, num_keys: int) -> KeyRange | None:
        size = num_keys_of(self.config.sink_size, num_keys)
        return KeyRange(0, min(size, num_keys)) if size else None
