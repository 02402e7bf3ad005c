"""Small things that many modules need: dtypes, autocast, generators, tuples. Needs nothing but torch."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def str_to_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`"bf16"`, `"bfloat16"` and the like as a torch dtype; None and dtypes pass. Raises ValueError for other
    names."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; valid are None, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def get_autocast_context(x: Tensor | Sequence[Tensor], dtype: str | torch.dtype | None) -> AbstractContextManager[Any]:
    """The autocast region for a computation on `x` (a tensor or a list of tensors on one device).

    None leaves everything as it is, float32 turns autocast off, and another dtype turns it on. Turning it off
    does not cast: whoever needs float32 casts inside the region.
    """
    dtype = str_to_dtype(dtype)
    device_type = (x if isinstance(x, Tensor) else x[0]).device.type
    # The meta device, for one, computes nothing and knows no autocast.
    if dtype is None or not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    if dtype == torch.float32:
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=dtype)


def detect_bf16_support() -> bool:
    """Whether there is a GPU that computes in bfloat16. A CPU gains nothing from it, so without a GPU the
    answer is no."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def get_bf16_context(enabled: bool = True, device_type: str | None = None) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 if `enabled`, on the GPU if there is one unless `device_type` says otherwise."""
    if not enabled:
        return nullcontext()
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device_type, dtype=torch.bfloat16)


def get_generator(seed: int | None = None, device: str | torch.device = "cpu") -> torch.Generator | None:
    """A seeded generator, or None without a seed, which stands for torch's default generator everywhere."""
    if seed is None:
        return None
    return torch.Generator(device=device).manual_seed(seed)


def to_ntuple(n: int) -> Callable[[Any], tuple[Any, ...]]:
    """The function that repeats a value `n` times, and turns an iterable of `n` values into a tuple.

    It raises ValueError for an iterable of another length.
    """

    def to_tuple(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, Iterable):
            return (value,) * n
        values = tuple(value)
        if len(values) != n:
            raise ValueError(f"expected one value or {n}, got {len(values)}: {values}")
        return values

    return to_tuple


to_1tuple = to_ntuple(1)
to_2tuple = to_ntuple(2)
to_3tuple = to_ntuple(3)
to_4tuple = to_ntuple(4)
