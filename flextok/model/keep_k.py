"""How many tokens of each sample to keep: the distributions of nested dropout."""

from typing import Literal, get_args

import torch

KeepKMode = Literal["uniform", "pow2", "uniform_pow2"]


def sample_keep_k(
    mode: KeepKMode, num_tokens: int, num_samples: int, generator: torch.Generator | None = None
) -> list[int]:
    """Draw `num_samples` values of `keep_k`, on the CPU.

    `uniform`: 1..num_tokens; `pow2`: uniform over the powers of two up to `num_tokens`, itself one; `uniform_pow2`: a
    uniform integer rounded up to a power of two, which may exceed `num_tokens` and then keeps all.
    """
    if mode == "pow2":
        exponents = torch.randint(0, num_tokens.bit_length(), (num_samples,), generator=generator)
        return (2**exponents).tolist()
    values = torch.randint(1, num_tokens + 1, (num_samples,), generator=generator).tolist()
    if mode == "uniform_pow2":
        return [1 << (value - 1).bit_length() for value in values]
    return values


def check_keep_k_mode(mode: str, num_tokens: int | None = None) -> None:
    """Raise ValueError for an unknown mode, or for `pow2` with a number of tokens that is no power of two."""
    if mode not in get_args(KeepKMode):
        raise ValueError(f"size_sampling_mode={mode!r} is unknown; valid: {', '.join(get_args(KeepKMode))}")
    if mode == "pow2" and num_tokens is not None and num_tokens & (num_tokens - 1):
        raise ValueError(
            f"size_sampling_mode='pow2' needs a power of two of tokens, got {num_tokens}; "
            f"use 'uniform' or 'uniform_pow2'"
        )
