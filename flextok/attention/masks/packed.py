"""Masks of samples packed in one row, with the order rules of the trunks and nested dropout."""

from collections.abc import Callable

from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def packed_mask(sample: Tensor, position: Tensor, before_last: Tensor, *, mode: str) -> MaskMod:
    """Attend within one sample; `sample` is -1 for tokens that take no part.

    Args are `[total]` tensors, one value per token of the packed row. `mode` is `full`, `causal` (position of the key
    <= that of the query) or `causal_last` (`causal`, or the key lies before the sample's last sub-sequence).
    """

    def full(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (sample[q_idx] == sample[kv_idx]) & (sample[kv_idx] >= 0)

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return full(b, h, q_idx, kv_idx) & (position[kv_idx] <= position[q_idx])

    def causal_last(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ordered = (position[kv_idx] <= position[q_idx]) | before_last[kv_idx]
        return full(b, h, q_idx, kv_idx) & ordered

    return {"full": full, "causal": causal, "causal_last": causal_last}[mode]
