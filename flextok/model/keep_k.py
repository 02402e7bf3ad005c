"""How many tokens of each sample to keep: the distributions of nested dropout."""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, Literal, get_args

import torch

from flextok.model.data_dict import Generators
from flextok.model.draw import draw_uniform

KeepKMode = Literal["uniform", "pow2", "uniform_pow2"]


def sample_keep_k(mode: KeepKMode, num_tokens: Sequence[int], generator: Generators = None) -> list[int]:
    """Draw one `keep_k` for each sample, whose number of tokens N is given.

    `uniform`: 1..N; `pow2`: uniform over the powers of two up to N, itself one; `uniform_pow2`: a uniform integer
    rounded up to a power of two, which may exceed N and then keeps all.
    """
    draws = draw_uniform((len(num_tokens),), generator, "cpu").double()
    if mode == "pow2":
        choices = torch.tensor([n.bit_length() for n in num_tokens])
        return (2 ** (draws * choices).long()).tolist()
    values = ((draws * torch.tensor(num_tokens)).long() + 1).tolist()
    if mode == "uniform_pow2":
        return [1 << (value - 1).bit_length() for value in values]
    return values


def default_keep_ks(num_registers: int) -> list[int]:
    """Where models are judged unless told otherwise: powers of two below the number of registers, and that number."""
    powers = [2**exponent for exponent in range(num_registers.bit_length())]
    return sorted({power for power in powers if power < num_registers} | {num_registers})


def checked_keep_ks(keep_ks: Iterable[Any], batch: int, key: str) -> list[int]:
    """One whole number >= 0 per sample, as plain ints; ValueError names `key` and what is wrong."""
    try:
        values = [index(keep_k) for keep_k in keep_ks]
    except TypeError:
        values = [-1]
    if len(values) != batch or min(values, default=0) < 0:
        raise ValueError(f"{key}={keep_ks!r}: valid is a list of {batch} whole numbers, one per sample, none negative")
    return values


def check_keep_k_mode(mode: str, num_tokens: Sequence[int] = ()) -> None:
    """Raise ValueError for an unknown mode, or for `pow2` with a number of tokens that is no power of two."""
    if mode not in get_args(KeepKMode):
        raise ValueError(f"size_sampling_mode={mode!r} is unknown; valid: {', '.join(get_args(KeepKMode))}")
    odd = [n for n in num_tokens if n & (n - 1)]
    if mode == "pow2" and odd:
        raise ValueError(
            f"size_sampling_mode='pow2' needs a power of two of tokens, got {odd[0]}; use 'uniform' or 'uniform_pow2'"
        )
