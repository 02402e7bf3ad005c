"""What a backend makes of a mask once per forward pass, for all layers to share."""

from abc import ABC, abstractmethod
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
