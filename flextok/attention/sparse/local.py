"""The keys around a query: those up to it, or those on both sides."""

from dataclasses import dataclass

from flextok.attention.sparse.config import (
    FixedMaskerConfig,
    Given,
    Size,
    checked_bool,
    checked_choice,
    checked_size,
    num_keys_of,
)
from flextok.attention.sparse.geometric import GeometricMasker, KeyRange
from flextok.attention.sparse.registry import MaskerRegistry


@dataclass
class LocalMaskerConfig(FixedMaskerConfig):
    """A window of `window_size` keys."""

    window_size: Given[Size]
    mode: Given[str] = "trailing"
    """trailing: the query and `window_size - 1` keys before it; centered: it and `window_size` keys on each side."""
    dense_when_short: Given[bool] = True
    """Trailing only: every key when there are no more than the window and the queries together. That makes all
    self-attention dense: a decoder that wants a window sets it to False."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.window_size = checked_size("window_size", self.window_size)
        self.mode = checked_choice("mode", self.mode, ("trailing", "centered"))
        self.dense_when_short = checked_bool("dense_when_short", self.dense_when_short)


@MaskerRegistry.register(LocalMaskerConfig)
class LocalMasker(GeometricMasker):
    """Adds the keys in the window of each query."""

    config: LocalMaskerConfig

    def key_range(self, num_queries: int, num_keys: int) -> KeyRange | None:
        window = num_keys_of(self.config.window_size, num_keys)
        if window == 0:
            return None
        if self.config.mode == "centered":
            return KeyRange(-window, window + 1, start_moves=True, stop_moves=True)
        if self.config.dense_when_short and num_keys <= window + num_queries:
            return KeyRange(0, num_keys)
        return KeyRange(1 - window, 1, start_moves=True, stop_moves=True)
