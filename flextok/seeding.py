"""Turn names into random numbers: the same parts give the same stream on every machine, in every process.

Python's `hash` of a string changes from process to process, and sums such as `seed + step` collide; a
cryptographic digest does neither.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def mixed_seed(*parts: int | str) -> int:
    """One seed in [0, 2**63) out of several parts; each part, its type and its place count.

    torch's CPU generator reads only the lowest 32 bits, which are as well mixed as all others.

    `mixed_seed(0, "step", 12)` differs from `mixed_seed(0, "step", "12")` and `mixed_seed(0, 12, "step")`.
    """
    from hashlib import blake2b

    digest = blake2b(digest_size=8)
    for part in parts:
        # The length keeps ("ab", "c") and ("a", "bc") apart; int() makes 1 and True one seed.
        text = f"s{part}" if isinstance(part, str) else f"i{int(part)}"
        data = text.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little") >> 1


def image_generator(seed: int, key: str, *, stream: str = "decode") -> "torch.Generator":
    """A fresh CPU generator for one image: batch size, order and device do not change what is drawn for it.

    `stream` separates uses that must not share numbers: noise for a VAE posterior and start noise for the
    sampler may have the same shape and would be identical.
    """
    import torch

    return torch.Generator().manual_seed(mixed_seed(seed, key, stream))


def image_generators(seed: int, keys: Iterable[str], *, stream: str) -> "list[torch.Generator]":
    """The generators of a batch of images; see `image_generator`."""
    return [image_generator(seed, key, stream=stream) for key in keys]
