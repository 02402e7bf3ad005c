"""Bits of hash functions, packed into words, and how many of them differ."""

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

_WORDS = {8: (torch.uint8, np.uint8), 32: (torch.int32, np.uint32), 64: (torch.int64, np.uint64)}


def pack_bits(bits: Bool[Tensor, "*rows bits"]) -> Shaped[Tensor, "words *rows"]:
    """Words of 8, 32 or 64 bits, the smallest that hold all, else several of 64."""
    width = next((width for width in _WORDS if bits.shape[-1] <= width), 64)
    num_words = -(-bits.shape[-1] // width)
    padded = torch.nn.functional.pad(bits, (0, num_words * width - bits.shape[-1]))
    shifts = torch.arange(width, device=bits.device)
    words = (padded.unflatten(-1, (num_words, width)).long() << shifts).sum(-1)
    return words.movedim(-1, 0).to(_WORDS[width][0]).contiguous()


def hamming_distance(
    first: Shaped[Tensor, "words *rows num_first"], second: Shaped[Tensor, "words *rows num_second"]
) -> Shaped[Tensor, "*rows num_first num_second"]:
    """How many bits of each pair of signatures differ, int32 (uint8 for signatures of one word)."""
    # Word by word, so that nothing larger than the result is made.
    counts = [popcount(a[..., :, None] ^ b[..., None, :]) for a, b in zip(first, second, strict=True)]
    if len(counts) == 1:
        return counts[0]
    total = counts[0].int()
    for count in counts[1:]:
        total += count
    return total


def popcount(words: Tensor) -> Tensor:
    """How many bits of each word are 1, uint8."""
    if words.device.type != "cpu":
        return popcount_by_arithmetic(words)
    # torch has no such function; as unsigned, for numpy counts the bits of the absolute value.
    unsigned = next(numpy_type for torch_type, numpy_type in _WORDS.values() if torch_type == words.dtype)
    return torch.from_numpy(np.bitwise_count(words.contiguous().numpy().view(unsigned)))


def popcount_by_arithmetic(words: Tensor) -> Tensor:
    """The same by sums of neighbouring bits, on any device."""
    width = torch.iinfo(words.dtype).bits
    # A negative word is extended by ones, which are cut off again.
    x = words.long() & (2**width - 1) if width < 64 else words
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56 & 0xFF).to(torch.uint8)
