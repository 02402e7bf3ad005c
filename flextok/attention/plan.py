"""What a backend makes of a mask once per forward pass, for all layers to share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flextok.attention.layout import SequenceLayout


@dataclass(frozen=True)
class AttentionPlan(ABC):
    """Attention under one mask: index tensors and kernels are chosen, queries, keys and values are missing.

    A plan holds tensors and no lengths that a compiled block would have to be compiled for.
    """

    layout: SequenceLayout | None
    """Layout of the packed row; None for other masks."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of q, k, v `[batch, heads, tokens, head_dim]`; rows that see nothing give zeros."""

    @property
    def takes_some_queries(self) -> bool:
        """True for what `for_queries_of` made: `attend` takes their queries alone, keys and values of all tokens."""
        return False

    def for_queries_of(self, subsequences: Sequence[int]) -> "AttentionPlan":
        """The plan for a layer of which only these sub-sequences are read; this one where another would not pay."""
        return self
