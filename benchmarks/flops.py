"""How many floating-point operations per second a device could do; how many a step needs is in
`flextok.training.flops`.
"""

import torch

from benchmarks.harness import measure_in_turn
from flextok.training.flops import stated_peak


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s the device could reach, and where the number is from: a table, or a large product."""
    stated = stated_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if stated is not None:
        return stated[0], f"stated for {stated[1]}, dense bfloat16"
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    # The fastest, not the median: a peak is what the device can do when nothing disturbs it.
    seconds = min(measure_in_turn({"product": lambda: a @ b}, repeats=20, warmup=2, device=device)["product"])
    return 2 * size**3 / seconds, f"measured with a product of {size} x {size} {str(dtype).removeprefix('torch.')}"
