"""Samples packed in one row do not see each other."""

from torch import Tensor

from flextok.attention.masks.mask_mod import MaskMod, check_table, lookup


def same_sample_mask(sample: Tensor) -> MaskMod:
    """Keys with the query's number in `sample`, integers `[length]` or `[batch, length]`.

    A negative number marks a token that takes no part: it attends to nobody, nobody attends to it.
    """
    check_table("sample", sample, "integer")

    def same_sample(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        of_key = lookup(sample, b, kv_idx)
        return (lookup(sample, b, q_idx) == of_key) & (of_key >= 0)

    return same_sample
