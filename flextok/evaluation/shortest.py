"""How many tokens does an image need? The shortest prefix that meets a target, found by bisection."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flextok.evaluation.reconstruction import psnr_of_mse, ssim, to_unit_range
from flextok.reconstruct import Encoded, decode_tokens


def _psnr(reconstructions: Tensor, images: Tensor) -> list[float]:
    return [psnr_of_mse(value) for value in (reconstructions - images).square().flatten(1).mean(1).tolist()]


def _ssim(reconstructions: Tensor, images: Tensor) -> list[float]:
    return ssim(reconstructions, images).tolist()


# Of images in [0, 1]; more is better.
_METRICS = {"psnr": _psnr, "ssim": _ssim}


@dataclass(frozen=True)
class Target:
    """A quality that reconstructions are to have: `psnr` in dB, or `ssim`."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """`psnr=24`; ValueError for what is no target."""
        metric, _, value = text.partition("=")
        try:
            target = cls(metric, float(value))
        except ValueError:
            target = None
        # Also false for NaN.
        if target is None or metric not in _METRICS or not abs(target.value) < float("inf"):
            raise ValueError(f"target {text!r}: valid are {' and '.join(f'{name}=NUMBER' for name in _METRICS)}")
        return target

    def is_met(self, reconstructions: Tensor, images: Tensor) -> list[bool]:
        """For each of `[B, 3, H, W]` reconstructions in [-1, 1], whether it is as good as that."""
        ours, truth = to_unit_range(reconstructions), to_unit_range(images)
        return [quality >= self.value for quality in _METRICS[self.metric](ours, truth)]


@torch.no_grad()
def tokens_needed(
    model: Any, images: Tensor, encoded: Encoded, target: Target, *, longest: int, seed: int, **decode_options: Any
) -> list[int | None]:
    """For each of `[B, 3, H, W]` images the smallest number of tokens that meets the target, None if no number does.

    Args:
        encoded: The same images after the encoder.
        longest: How many tokens are tried at most.
        decode_options: As in `decode_tokens`; the noise is the same for every number.
    """

    def is_met(keep_ks: Sequence[int]) -> list[bool]:
        decoded = decode_tokens(model, encoded, keep_k=keep_ks, seed=seed, **decode_options)
        return target.is_met(decoded, images)

    return shortest_prefixes(is_met, len(images), longest=longest)


def shortest_prefixes(
    is_met: Callable[[Sequence[int]], Sequence[bool]], num_images: int, *, longest: int
) -> list[int | None]:
    """Bisect the length of each image's prefix; None where not even `longest` tokens are enough.

    Quality is taken to grow with the number of tokens. Where it does not, the result is a number that meets the target
    and is preceded by one that does not.

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
