"""The catalogue of masks: factories of FlexAttention `mask_mod`s, and what combines and shows them."""

from flextok.attention.masks.causal import causal_mask, causal_positions_mask
from flextok.attention.masks.compose import and_masks, or_masks
from flextok.attention.masks.local import symmetric_window_mask, trailing_window_mask
from flextok.attention.masks.mask_mod import MaskMod, materialize
from flextok.attention.masks.nested_dropout import alive_mask, nested_dropout_mask
from flextok.attention.masks.packed import packed_mask
from flextok.attention.masks.positions import position_window_mask
from flextok.attention.masks.prefix import prefix_mask, visible_keys_mask
from flextok.attention.masks.same_sample import same_sample_mask
from flextok.attention.masks.segments import (
    create_flex_attention_mask,
    create_segment_isolation_mask,
    isolation_adjacency,
    segment_fusion,
    segment_ids_from_spans,
)

__all__ = [
    "MaskMod",
    "alive_mask",
    "and_masks",
    "causal_mask",
    "causal_positions_mask",
    "create_flex_attention_mask",
    "create_segment_isolation_mask",
    "isolation_adjacency",
    "materialize",
    "nested_dropout_mask",
    "or_masks",
    "packed_mask",
    "position_window_mask",
    "prefix_mask",
    "same_sample_mask",
    "segment_fusion",
    "segment_ids_from_spans",
    "symmetric_window_mask",
    "trailing_window_mask",
    "visible_keys_mask",
]
