"""Tensors of which each process may keep only a part, and code that need not know whether it does."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def sharded_like(stored: Tensor, parameter: Tensor) -> Tensor:
    """`stored` on the device of a parameter and, where the parameter is sharded, this process's part of it."""
    if isinstance(parameter, DTensor) and not isinstance(stored, DTensor):
        whole = stored.to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return stored.to(parameter.device)


def part_of(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be sharded; call it without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together; where they are sharded, over all processes, which all have to call it."""
    norm = torch.nn.utils.get_total_norm([part_of(gradient) for gradient in gradients])
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        # Left to itself, torch would ask the other processes once per gradient.
        squares = norm.square()
        dist.all_reduce(squares)
        norm = squares.sqrt()
    return norm
