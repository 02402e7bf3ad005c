"""How many tokens does an image need? The shortest prefix that meets a target, found by bisection."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok.evaluation.networks import Networks
from flextok.evaluation.targets import NO_NETWORKS, Target
from flextok.reconstruct import Encoded, decode_tokens


@torch.no_grad()
def tokens_needed(
    model: Any,
    images: Tensor,
    encoded: Encoded,
    target: Target,
    *,
    longest: int,
    seed: int,
    networks: Networks = NO_NETWORKS,
    **decode_options: Any,
) -> list[int | None]:
    """For each of `[B, 3, H, W]` images the smallest number of tokens that meets the target, None if `longest` do not.

    Args:
        encoded: The same images after the encoder.
        longest: How many tokens are tried at most.
        networks: Among them the one that the target needs.
        decode_options: As in `decode_tokens`; the noise is the same for every number.
    """
    judge = target.judge(images, networks)

    def is_met(keep_ks: Sequence[int]) -> list[bool]:
        return judge(decode_tokens(model, encoded, keep_k=keep_ks, seed=seed, **decode_options))

    return shortest_prefixes(is_met, len(images), longest=longest)


def shortest_prefixes(
    is_met: Callable[[Sequence[int]], Sequence[bool]], num_images: int, *, longest: int
) -> list[int | None]:
    """Bisect the length of each image's prefix; None where not even `longest` tokens are enough.

    Quality is taken to grow with the number of tokens. Where it does not, the result is a number that meets the target
    and is preceded by one that does not: one where quality crosses the target, not always the first.

    Args:
        is_met: Asked about one number of tokens per image, in 1..longest, for all images at once: about
            log2(longest) times.
    """
    too_few, enough = [0] * num_images, [longest + 1] * num_images
    while any(high - low > 1 for low, high in zip(too_few, enough, strict=True)):
        asked = [max(1, (low + high) // 2) for low, high in zip(too_few, enough, strict=True)]
        for number, answer in enumerate(is_met(asked)):
            if enough[number] - too_few[number] > 1:
                (enough if answer else too_few)[number] = asked[number]
    return [None if number > longest else number for number in enough]


def num_rounds(longest: int) -> int:
    """How often `shortest_prefixes` asks at most."""
    return longest.bit_length()
