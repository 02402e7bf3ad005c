"""Masks of samples packed in one row, with the order rules of the trunks and nested dropout."""

from torch import Tensor

from flextok.attention.masks.causal import causal_positions_mask
from flextok.attention.masks.compose import and_masks, or_masks
from flextok.attention.masks.mask_mod import MaskMod
from flextok.attention.masks.prefix import visible_keys_mask
from flextok.attention.masks.same_sample import same_sample_mask


def packed_mask(sample: Tensor, position: Tensor, before_last: Tensor, *, mode: str) -> MaskMod:
    """Attend within one sample; `sample` is -1 for tokens that take no part.

    Args are `[total]` tensors, one value per token of the packed row. `mode` is `full`, `causal` (position of the key
    <= that of the query) or `causal_last` (`causal`, or the key lies before the sample's last sub-sequence).
    """
    within = same_sample_mask(sample)
    if mode == "full":
        return within
    causal = causal_positions_mask(position)
    if mode == "causal":
        return and_masks(within, causal)
    if mode == "causal_last":
        return and_masks(within, or_masks(causal, visible_keys_mask(before_last)))
    raise ValueError(f"mode={mode!r} is unknown; valid: full, causal, causal_last")
