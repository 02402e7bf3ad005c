"""Floating-point operations of a training step, and how many of them a device could do.

A multiply and an add are two operations. Every weight of a linear map costs 2 in the forward and 4 in the backward pass
for each row it is applied to: 6 * parameters * rows. Attention costs 2 * width for the scores and 2 * width for the
values of each pair of query and key that may see each other, three times that with the backward pass: 12 * width *
pairs in each layer. Only what the mask lets through counts, whatever a kernel computes besides.

MFU (model FLOPs utilisation) is these operations per second divided by the device's peak. It counts the trunks alone:
embedders and heads are below one percent.
"""

from collections.abc import Iterable

import torch

from benchmarks.harness import measure_in_turn

DENSE_BF16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""FLOP/s by a part of the GPU's name, as its maker states them for dense bfloat16; first match counts."""


def linear_training_flops(parameters: int, rows: int) -> int:
    """Forward and backward of linear maps with `parameters` weights, applied to `rows` rows."""
    return 6 * parameters * rows


def attention_training_flops(width: int, pairs: int) -> int:
    """Forward and backward of one attention layer over `pairs` visible pairs, summed over samples."""
    return 12 * width * pairs


def full_pairs(lengths: Iterable[int]) -> int:
    """Pairs where every token of a sample sees all tokens of it."""
    return sum(length * length for length in lengths)


def causal_last_pairs(num_patches: int, num_registers: int) -> int:
    """Pairs of one sample whose patches see patches, and whose registers see patches and registers up to themselves."""
    return num_patches**2 + num_registers * num_patches + num_registers * (num_registers + 1) // 2


def trunk_training_flops(
    *, token_weights: int, tokens: int, sample_weights: int, samples: int, depth: int, width: int, pairs: int
) -> int:
    """One trunk: `token_weights` act on every token, `sample_weights` (the modulation) once per sample."""
    linear = linear_training_flops(token_weights, tokens) + linear_training_flops(sample_weights, samples)
    return linear + depth * attention_training_flops(width, pairs)


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s the device could reach, and where the number is from: the table above, or a large product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in DENSE_BF16_PEAKS.items():
            if part in name:
                return peak, f"stated for {part}, dense bfloat16"
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    # The fastest, not the median: a peak is what the device can do when nothing disturbs it.
    seconds = min(measure_in_turn({"product": lambda: a @ b}, repeats=20, warmup=2, device=device)["product"])
    return 2 * size**3 / seconds, f"measured with a product of {size} x {size} {str(dtype).removeprefix('torch.')}"
