"""The reference as a backend: every score is computed, whatever the mask."""

from dataclasses import dataclass

from torch import Tensor

from flextok.attention.plan import AttentionPlan
from flextok.attention.reference import ScoreMod, reference_attention


@dataclass(frozen=True)
class ReferencePlan(AttentionPlan):
    """Softmax attention under a dense mask and a score function."""

    mask: Tensor | None
    score_mod: ScoreMod | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return reference_attention(q, k, v, self.mask, scale=scale, score_mod=self.score_mod)
