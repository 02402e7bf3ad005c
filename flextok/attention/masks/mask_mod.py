"""What a mask is, its lookups in tables of facts about tokens, and the dense form of any mask.

A mask is FlexAttention's `mask_mod`: `(b, h, q_idx, kv_idx) -> bool`, where True lets the query attend to the key. The
four arguments are integer tensors of any shapes that broadcast, so one function serves a dense matrix, vmap and a
kernel. Masks of this package are made by factories that capture tensors; the functions they return have no control flow
that depends on values, so other values in a captured tensor never make a compiler start again.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def materialize(
    mask_mod: MaskMod, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The mask as bool `[B, H, Q_LEN, KV_LEN]`; None counts as 1. `device` is that of the tensors it captures."""
    return create_mask(mask_mod, B, H, Q_LEN, KV_LEN, device=device)


def lookup(table: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Entry `index` of `table` `[length]`, which serves every row of the batch, or of its row b, `[batch, length]`."""
    return table[index] if table.ndim == 1 else table[b, index]


def lookup_row(values: Tensor, b: Tensor) -> Tensor:
    """The value `[]` that serves every row of the batch, or entry b of `[batch]`."""
    return values if values.ndim == 0 else values[b]


def check_table(name: str, table: Tensor, dtypes: str) -> None:
    """ValueError unless `table` is `[length]` or `[batch, length]` and of `dtypes`, which is `bool` or `integer`."""
    if table.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {list(table.shape)}; valid: [length] or [batch, length]")
    check_dtype(name, table, dtypes)


def check_row_values(name: str, values: Tensor) -> None:
    """ValueError unless `values` are integers, `[]` or `[batch]`."""
    if values.ndim > 1:
        raise ValueError(f"{name} has shape {list(values.shape)}; valid: [] or [batch]")
    check_dtype(name, values, "integer")


def check_dtype(name: str, values: Tensor, dtypes: str) -> None:
    """ValueError if `values` are not `bool` or not `integer`, whichever `dtypes` says."""
    is_bool = values.dtype == torch.bool
    is_fraction = values.dtype.is_floating_point or values.dtype.is_complex
    if is_bool != (dtypes == "bool") or is_fraction:
        raise ValueError(f"{name} is of {values.dtype}; valid: {dtypes}")
