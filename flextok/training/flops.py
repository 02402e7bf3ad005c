"""Floating-point operations of a training step, and how many of them a device could do.

A multiply and an add are two operations. Every weight of a linear map costs 2 in the forward and 4 in the backward pass
for each row it is applied to: 6 * parameters * rows. Attention costs 2 * width for the scores and 2 * width for the
values of each pair of query and key that may see each other, three times that with the backward pass: 12 * width *
pairs in each layer. Only what the mask lets through counts, whatever a kernel computes besides, and nothing that is
computed twice to save memory.

MFU (model FLOPs utilisation) is these operations per second divided by the device's peak. It counts the trunks alone:
embedders and heads are below one percent; a VAE and the teacher of REPA are not what is trained.
"""

from collections.abc import Iterable
from typing import Any

from flextok.attention.layout import SequenceLayout

DENSE_BF16_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""FLOP/s by a part of the GPU's name, as its maker states them for dense bfloat16 and float16; first match counts."""


def stated_peak(device_name: str) -> tuple[float, str] | None:
    """FLOP/s in half precision of a GPU and the name it has in the table; None if it is not there."""
    return next(((peak, part) for part, peak in DENSE_BF16_PEAKS.items() if part in device_name), None)


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


def visible_pairs(layout: SequenceLayout) -> int:
    """Pairs of a packed row whose query may see the key; for rows in which every token is one (`last_counts` None)."""
    if layout.mode == "full":
        return full_pairs(layout.visible_lengths)
    if layout.mode == "causal":
        return sum(causal_last_pairs(0, visible) for visible in layout.visible_lengths)
    before = [sum(row[:-1]) for row in layout.lengths]
    return sum(causal_last_pairs(b, v - b) for b, v in zip(before, layout.visible_lengths, strict=True))


def trunk_training_flops(
    *, token_weights: int, tokens: int, sample_weights: int, samples: int, depth: int, width: int, pairs: int
) -> int:
    """One trunk: `token_weights` act on every token, `sample_weights` (the modulation) once per sample.

    The last layer counts in full, although it computes no more than what is read.
    """
    linear = linear_training_flops(token_weights, tokens) + linear_training_flops(sample_weights, samples)
    return linear + depth * attention_training_flops(width, pairs)


def trunk_weights(trunk: Any) -> dict[str, int]:
    """What `trunk_training_flops` wants to know about a `FlexTransformer`."""
    sizes = {name: weight.numel() for name, weight in trunk.blocks.named_parameters()}
    modulation = sum(size for name, size in sizes.items() if "adaLN_modulation" in name)
    return {
        "token_weights": sum(sizes.values()) - modulation,
        "sample_weights": modulation,
        "depth": len(trunk.blocks),
        "width": trunk.blocks[0].attn.proj.in_features,
    }
