"""Several processes, one run: the folder they share, and launches that would go wrong without a word.

Lightning starts the other processes of a machine itself and hands them the folder. `torchrun` starts all of them at
once: there rank 0 chooses the folder, and the others are told.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

if TYPE_CHECKING:
    from lightning import Trainer
    from lightning.pytorch.strategies import DDPStrategy
    from torch.distributed import TCPStore

T = TypeVar("T")

# How long the others wait for rank 0 to have read its config.
PATIENCE = timedelta(minutes=5)


def ddp_strategy(**options: Any) -> "DDPStrategy":
    """Lightning's `DDPStrategy`, which leaves buffers alone: ours are constants.

    Sending them before each forward costs time, and where one rank validates a batch more than another nobody answers.
    """
    from inspect import signature

    from lightning.pytorch.strategies import DDPStrategy
    from torch.nn.parallel import DistributedDataParallel

    names = ("forward_sync_buffers", "broadcast_buffers")  # The second is the older name.
    options[next(name for name in names if name in signature(DistributedDataParallel).parameters)] = False
    return DDPStrategy(**options)


def join_run_folder() -> list[str]:
    """The overrides by which a process of `torchrun` joins the run of rank 0, which it waits for; none elsewhere.

    They are those that Lightning gives to the processes it starts: the folder, a log file of their own, no second
    copy of the config. Call it before Hydra makes a folder.
    """
    if not _is_under_torchrun():
        return _below_first_task_of_slurm()
    if _rank() == 0:
        return []
    folder = _meeting_place().get(_key()).decode()
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.run.dir='{quoted}'", *_quietly(_rank())]


def announce_run_folder() -> None:
    """Tell the other processes of `torchrun`, if there are any, which folder rank 0 has made."""
    if _is_under_torchrun() and _rank() == 0 and HydraConfig.get().mode == RunMode.RUN:
        _meeting_place().set(_key(), HydraConfig.get().runtime.output_dir)


def check_launch(trainer: "Trainer") -> None:
    """Refuse launches in which processes would not work together.

    Raises:
        ValueError: a sweep under `torchrun` or on several machines that no cluster starts, or a `torchrun` with more
            processes than the trainer uses.
    """
    devices, nodes = trainer.num_devices, trainer.num_nodes
    is_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if devices * nodes > 1 and is_sweep and not _is_task_of_slurm_launcher():
        # Each process would read the same command line and start the whole sweep.
        raise ValueError(
            f"trainer.devices={devices} with trainer.num_nodes={nodes} cannot be used in this sweep (-m), where every "
            "process would start all runs; valid: one machine without torchrun, or hydra/launcher=slurm, which starts "
            "the processes of each run"
        )
    started = int(os.environ["WORLD_SIZE"]) if _is_under_torchrun() else devices * nodes
    if started != devices * nodes:
        raise ValueError(
            f"torchrun started {started} processes, but trainer.devices={devices} with trainer.num_nodes={nodes} "
            f"makes {devices * nodes}; valid: trainer=ddp, multi_node, fsdp, ddp_cpu or fsdp_cpu, with trainer.devices "
            "the --nproc-per-node and trainer.num_nodes the --nnodes of torchrun"
        )


def check_one_folder(folder: str) -> None:
    """Refuse processes that would write into different folders; call it on every rank.

    Raises:
        ValueError: the ranks do not agree, as when each machine took the time of its own start for a name.
    """
    folders = of_all_ranks(folder)
    if len(set(folders)) > 1:
        raise ValueError(
            f"paths.run={folder!r} is not the folder of all {len(folders)} processes (rank 0 has {folders[0]!r}); "
            "valid: the same hydra.run.dir=<folder> in every command, or start them with torchrun"
        )


def check_one_start(checkpoint: Path | None) -> None:
    """Refuse processes that would go on from different checkpoints; call it on every rank.

    Raises:
        ValueError: the ranks do not agree, as when the file system shows a new file to some machines later.
    """
    found = of_all_ranks(checkpoint)
    if len(set(found)) > 1:
        names = ", ".join(f"rank {rank}: {path}" for rank, path in enumerate(found))
        raise ValueError(
            f"the processes do not find the same checkpoint to go on from ({names}); valid: a file system that they "
            "share; the same command again, once all of them see the newest file"
        )


def of_all_ranks(value: T) -> list[T]:
    """What every rank passes, in the order of ranks; call it on all of them. One entry without other processes."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def by_rank_zero(work: Callable[[], None]) -> None:
    """Let rank 0 write something while the others wait, and fail on all of them if it cannot; call it on every rank.

    Raises:
        OSError, RuntimeError: what rank 0 met.
    """
    import torch.distributed as dist

    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            work()
        except (OSError, RuntimeError) as error:
            failure = error
    of_first = of_all_ranks(failure)[0]
    if of_first is not None:
        raise failure or of_first


def _quietly(rank: int) -> list[str]:
    return [f"hydra.job.name=train_rank_{rank}", "hydra.output_subdir=null"]


def _below_first_task_of_slurm() -> list[str]:
    # srun starts all tasks with one command line, in which the user names the folder.
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    return _quietly(rank) if rank > 0 else []


def is_started_from_outside() -> bool:
    """Whether torchrun, srun or submitit starts all processes of a run, so that Lightning starts none."""
    return _is_under_torchrun() or _is_task_of_slurm_launcher() or "LOCAL_RANK" in os.environ


def _is_task_of_slurm_launcher() -> bool:
    # submitit says so in the jobs it submits: there each task calls the function of one run.
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def _is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _rank() -> int:
    return int(os.environ["RANK"])


def _key() -> str:
    # After a failure torchrun starts all processes again: they must not join the folder of the failed attempt.
    return f"flextok/run_folder/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _meeting_place() -> "TCPStore":
    # Takes seconds to import: nobody but torchrun waits for it.
    from torch.distributed import TCPStore

    # The agent of torchrun on the first machine keeps this store; all of its processes can reach it.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=PATIENCE)
