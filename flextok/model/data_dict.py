"""The dictionary every module reads from and writes to, and the list-of-samples convention of its values.

| key (default name)              | written by       | value                                                     |
| ------------------------------- | ---------------- | --------------------------------------------------------- |
| `rgb`                           | caller           | B entries `[1, 3, H, W]` in [-1, 1]                       |
| `vae_latents`                   | VAE              | B entries `[1, C, h, w]`                                  |
| `enc_registers`                 | encoder          | B entries `[1, registers, width]`, then `[.., levels]`    |
| `enc_registers_quant`, `tokens` | FSQ              | B entries `[1, registers, levels]`, int64 ids             |
| `vae_latents_noised`            | noise or sampler | B entries `[1, C, h, w]`                                  |
| `timesteps`                     | noise or sampler | tensor `[B]`: 1 is noise, 0 is data                       |
| `eval_keep_k`                   | caller           | B ints: how many leading tokens the decoder sees          |
| `eval_dropout_mask`             | caller, sampler  | B bools: true replaces all tokens by the null condition   |
| `rng`                           | caller           | a `torch.Generator`, or one per sample                    |
| `trajectory`                    | sampler          | where it is; a `flextok.model.trajectory.Trajectory`      |
| `flow_passes`                   | objective        | per pass of the decoder, errors, times and `keep_k`       |

Names other than `eval_dropout_mask`, `rng`, `trajectory` and `flow_passes` are constructor arguments of the modules. A
module puts new values into the dictionary it was given; it never writes into a tensor or list the dictionary already
holds.
"""

from collections.abc import Sequence
from typing import Any

import torch

DataDict = dict[str, Any]
Generators = torch.Generator | Sequence[torch.Generator] | None

RNG_KEY = "rng"
NULL_CONDITION_KEY = "eval_dropout_mask"
