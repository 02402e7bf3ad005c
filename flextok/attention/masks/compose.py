"""Masks combine with *and* and *or*; the result is a mask again."""

from torch import Tensor

from flextok.attention.masks.mask_mod import MaskMod

# Not FlexAttention's own pair: those create a tensor like `b` and so refuse `b=0`, and accept no masks at all.


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """A query attends to a key iff every one of `mask_mods` lets it."""
    first, *others = _at_least_one("and_masks", mask_mods)

    def and_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = first(b, h, q_idx, kv_idx)
        for mask_mod in others:
            allowed = allowed & mask_mod(b, h, q_idx, kv_idx)
        return allowed

    return and_mask


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """A query attends to a key iff at least one of `mask_mods` lets it."""
    first, *others = _at_least_one("or_masks", mask_mods)

    def or_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = first(b, h, q_idx, kv_idx)
        for mask_mod in others:
            allowed = allowed | mask_mod(b, h, q_idx, kv_idx)
        return allowed

    return or_mask


def _at_least_one(name: str, mask_mods: tuple[MaskMod, ...]) -> tuple[MaskMod, ...]:
    wrong = [mask_mod for mask_mod in mask_mods if not callable(mask_mod)]
    if wrong or not mask_mods:
        given = repr(wrong[0]) if wrong else "nothing"
        raise ValueError(f"{name} got {given}; valid: one or more mask functions (b, h, q_idx, kv_idx) -> bool")
    return mask_mods
