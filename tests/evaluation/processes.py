"""Run a function in several real processes of `torch.distributed`."""

import logging
import multiprocessing
import os
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

PATIENCE = 120
PRELOAD = ["flextok.evaluation.run", "scipy.linalg", "torchmetrics.image.fid", "hypothesis", "pyarrow.parquet"]


def in_processes(function, folder, *arguments, world_size=2):
    """What `function(rank, world_size, *arguments)` returns in each process, in the order of ranks."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
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


def evaluate(folder, *overrides, world_size=1, **environment):
    """Exit codes of processes that evaluate as `torchrun eval.py` has them do it; what they log is in `folder`."""
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "WORLD_SIZE": str(world_size)}
    processes = [
        context.Process(target=_evaluate, args=(folder, overrides, {**meeting, **environment, "RANK": str(rank)}))
        for rank in range(world_size)
    ]
    for each in processes:
        each.start()
    while any(each.is_alive() for each in processes):
        wait([each.sentinel for each in processes if each.is_alive()], timeout=PATIENCE)
        # As torchrun does, one that fails ends all.
        if any(each.exitcode for each in processes):
            for each in processes:
                each.terminate()
    return [each.exitcode for each in processes]


def _evaluate(folder, overrides, environment):
    from flextok.config import compose
    from flextok.evaluation.run import run

    os.environ.update(environment)
    torch.set_num_threads(1)
    logging.basicConfig(filename=folder / f"rank_{environment['RANK']}.log", level=logging.INFO)
    run(compose(overrides, "eval"))
