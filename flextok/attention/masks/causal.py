"""Order: a token sees itself and what came before it."""

from torch import Tensor

from flextok.attention.masks.mask_mod import MaskMod, check_table, lookup


def causal_mask() -> MaskMod:
    """Keys at or before the query, by their index in the row."""

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx

    return causal


def causal_positions_mask(position: Tensor) -> MaskMod:
    """Keys at or before the query, by their `position`, integers `[length]` or `[batch, length]`.

    For rows in which order and place differ; combine it with `same_sample_mask` where positions start anew.
    """
    check_table("position", position, "integer")

    def causal_positions(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return lookup(position, b, kv_idx) <= lookup(position, b, q_idx)

    return causal_positions
