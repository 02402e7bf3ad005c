"""How well are the tokens used? Codebook usage, perplexity and entropy of the ids of the evaluated images."""

import math
from typing import Any

import torch
from torch import Tensor

ENTROPY_NOTE = (
    "Entropies (in bits) and perplexity are plug-in estimates and biased low: N images cannot show "
    "more than log2(N) bits at a position, whatever the codebook; see entropy_ceiling_bits."
)


def token_statistics(tokens: Tensor, codebook_size: int) -> dict[str, Any]:
    """Statistics of ids `[N, L]` (N images, L positions) from a codebook of `codebook_size` entries."""
    num_images, num_positions = tokens.shape
    if int(tokens.min()) < 0 or int(tokens.max()) >= codebook_size:
        raise ValueError(
            f"token ids from {int(tokens.min())} to {int(tokens.max())}: valid are 0 to {codebook_size - 1}"
        )
    per_position = [entropy_bits(tokens[:, position]) for position in range(num_positions)]
    num_used = int(torch.unique(tokens).numel())
    return {
        "codebook_size": codebook_size,
        "num_tokens": num_images * num_positions,
        "bits_per_token": math.log2(codebook_size),
        "bits_per_image": num_positions * math.log2(codebook_size),
        "codes_used": num_used,
        "codebook_usage": num_used / codebook_size,
        "codebook_usage_ceiling": min(1.0, num_images * num_positions / codebook_size),
        "perplexity": 2 ** entropy_bits(tokens),
        "entropy_bits_per_position": per_position,
        "entropy_bits_mean": math.fsum(per_position) / num_positions,
        "entropy_ceiling_bits": math.log2(min(num_images, codebook_size)),
        "note": ENTROPY_NOTE,
    }


def entropy_bits(ids: Tensor) -> float:
    """Empirical entropy in bits of the ids in a tensor of any shape."""
    counts = torch.unique(ids, return_counts=True)[1].double()
    shares = counts / counts.sum()
    # One id alone gives -1 * log2(1) = -0.0.
    return abs(float(-(shares * shares.log2()).sum()))
