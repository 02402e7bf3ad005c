"""Run a function in several real processes of `torch.distributed`."""

import multiprocessing
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = 120


def in_processes(function, folder, *arguments, world_size=2):
    """What `function(rank, world_size, *arguments)` returns in each process, in the order of ranks."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flextok.evaluation.sweep", "scipy.linalg", "torchmetrics.image.fid", "hypothesis"])
    processes = [
        context.Process(target=_process, args=(function, folder, rank, world_size, arguments))
        for rank in range(world_size)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(timeout=PATIENCE)
        if each.is_alive():
            each.kill()
    assert [each.exitcode for each in processes] == [0] * world_size
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]


def _process(function, folder, rank, world_size, arguments):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size, rank)
    torch.save(function(rank, world_size, *arguments), folder / f"result_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
