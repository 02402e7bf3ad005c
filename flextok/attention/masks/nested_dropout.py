"""Nested dropout: dropped tokens neither attend nor are attended to."""

from torch import Tensor

from flextok.attention.masks.mask_mod import MaskMod, check_row_values, check_table, lookup, lookup_row


def nested_dropout_mask(keep_k: Tensor, num_before: int) -> MaskMod:
    """Rows are `[num_before tokens | registers]`, of which row b keeps the first `keep_k[b]` registers.

    `keep_k`: an integer for all rows or `[batch]`.
    """
    if num_before < 0:
        raise ValueError(f"num_before={num_before}; valid: 0 or more tokens before the registers")
    check_row_values("keep_k", keep_k)
    # One tensor, so that the sum is not computed again for every pair.
    num_alive = keep_k + num_before

    def nested_dropout(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        end = lookup_row(num_alive, b)
        return (q_idx < end) & (kv_idx < end)

    return nested_dropout


def alive_mask(alive: Tensor) -> MaskMod:
    """The same for rows of any order, such as packed ones: `alive` is bool `[length]` or `[batch, length]`."""
    check_table("alive", alive, "bool")

    def both_alive(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return lookup(alive, b, q_idx) & lookup(alive, b, kv_idx)

    return both_alive
