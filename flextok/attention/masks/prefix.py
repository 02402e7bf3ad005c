"""Prefix-LM: some keys come first and are seen by everybody, the rest is causal."""

from torch import Tensor

from flextok.attention.masks.causal import causal_mask
from flextok.attention.masks.compose import or_masks
from flextok.attention.masks.mask_mod import MaskMod, check_row_values, check_table, lookup, lookup_row


def prefix_mask(prefix_length: Tensor) -> MaskMod:
    """Keys before `prefix_length`, an integer for all rows or `[batch]`, and keys at or before the query."""
    check_row_values("prefix_length", prefix_length)

    def in_prefix(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx < lookup_row(prefix_length, b)

    return or_masks(causal_mask(), in_prefix)


def visible_keys_mask(visible: Tensor) -> MaskMod:
    """Keys that `visible`, bool `[length]` or `[batch, length]`, marks: a prefix that lies anywhere in the row."""
    check_table("visible", visible, "bool")

    def visible_keys(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return lookup(visible, b, kv_idx)

    return visible_keys
