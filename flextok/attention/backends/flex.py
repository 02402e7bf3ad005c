"""FlexAttention: any mask and any change of the scores, in one kernel on CUDA.

On the CPU it runs uncompiled and forward only: compiled it is wrong there at some sizes, and it has no backward.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flextok.attention.plan import AttentionPlan
from flextok.attention.reference import ScoreMod


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


@dataclass(frozen=True)
class FlexPlan(AttentionPlan):
    """FlexAttention under a block mask."""

    block_mask: BlockMask | None
    score_mod: ScoreMod | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # Inside a compiled block it becomes part of that block's graph.
        compiled = q.device.type == "cuda" and not torch.compiler.is_compiling()
        attention = _compiled_flex_attention() if compiled else flex_attention
        is_grouped = q.shape[1] != k.shape[1]
        return attention(
            q, k, v, score_mod=self.score_mod, block_mask=self.block_mask, scale=scale, enable_gqa=is_grouped
        )


def add_key_bias(bias: Tensor, score_mod: ScoreMod | None = None) -> ScoreMod:
    """A score function that adds `bias[key]`, float `[keys]`, after `score_mod`."""

    def biased(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        changed = score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)
        return changed + bias[kv_idx]

    return biased
