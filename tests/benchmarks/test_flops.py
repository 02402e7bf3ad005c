"""What a device could do."""

import torch

from benchmarks import flops


def test_the_peak_of_a_cpu_is_measured():
    peak, source = flops.peak_flops(torch.device("cpu"))
    assert peak > 1e6
    assert source.startswith("measured")
