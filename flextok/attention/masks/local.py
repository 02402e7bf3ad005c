"""Windows: a token sees its neighbours by index. Widths are part of the architecture, hence plain numbers."""

from torch import Tensor

from flextok.attention.masks.mask_mod import MaskMod


def trailing_window_mask(window: int) -> MaskMod:
    """The query itself and the `window - 1` keys before it."""
    if window < 1:
        raise ValueError(f"window={window}; valid: 1 (the token itself) or more")

    def trailing_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

    return trailing_window


def symmetric_window_mask(radius: int) -> MaskMod:
    """The query itself and `radius` keys on either side."""
    if radius < 0:
        raise ValueError(f"radius={radius}; valid: 0 (the token itself) or more")

    def symmetric_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx - kv_idx <= radius) & (kv_idx - q_idx <= radius)

    return symmetric_window
