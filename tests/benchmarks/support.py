"""The workload of the benchmarks, so small that a command takes a second."""

from dataclasses import replace

import torch

from benchmarks.workloads import WORKLOADS

CPU = torch.device("cpu")
# A head size other than 64, where the scale 8 / head_dim is not the usual one.
MINIATURE = replace(
    WORKLOADS["bench"],
    overrides=(
        *WORKLOADS["bench"].overrides,
        *("size.encoder_depth=2", "size.decoder_depth=2", "size.encoder_width=32", "size.decoder_width=64"),
        *("size.registers=8", "size.head_dim=16", "size.grid=4"),
    ),
    latent_size=8,
    batch=3,
)
