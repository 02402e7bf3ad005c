"""Several processes that share one evaluation; `torchrun` starts them and says in the environment who is who."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from flextok.data.samplers import rank_and_world_size

T = TypeVar("T")

# How long a process waits for the others: one may read or decode slowly, and a dead one is noticed by torchrun.
PATIENCE = timedelta(hours=2)


@contextmanager
def joined_processes(device: torch.device) -> Iterator[torch.device]:
    """Meet the other processes, if there are any, and leave them at the end; yields the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Objects travel on the CPU in any case.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if dist.get_rank() > 0:
        # They would say the same.
        logging.getLogger("flextok").setLevel(logging.ERROR)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def of_first_process(make: Callable[[], T]) -> T:
    """What rank 0 makes, while the others wait for it; call it on every rank.

    Raises:
        ValueError, OSError, RuntimeError: what rank 0 met, on all of them.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return make()
    made: list[T | Exception | None] = [None]
    if rank == 0:
        try:
            made = [make()]
        except (ValueError, OSError, RuntimeError) as error:
            made = [error]
    dist.broadcast_object_list(made, src=0)
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]  # type: ignore[return-value]


def joined(values: Iterable[T]) -> list[T]:
    """The values of all processes, those of rank 0 first; call it on every rank."""
    from flextok.training.distributed import of_all_ranks

    return [value for of_rank in of_all_ranks(list(values)) for value in of_rank]
