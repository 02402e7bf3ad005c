"""Masks by the positions of tokens, which need not be their places in the row."""

from torch import Tensor

from flextok.attention.masks.mask_mod import MaskMod, check_table, lookup


def position_window_mask(positions: Tensor, window: int) -> MaskMod:
    """Keys less than `window` positions before the query, or after it.

    `positions` are integers `[length]` or `[batch, length]`.
    """
    check_table("positions", positions, "integer")
    if window < 1:
        raise ValueError(f"window={window}; valid: 1 (the position itself) or more")

    def position_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return lookup(positions, b, q_idx) - lookup(positions, b, kv_idx) < window

    return position_window
