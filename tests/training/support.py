"""A run of a few steps on the embedded digits, in one process or several, and what may happen to it."""

import csv
import faulthandler
import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import torch
from lightning import Callback
from omegaconf import DictConfig, OmegaConf

from flextok.config import compose
from flextok.model.data_dict import RNG_KEY
from flextok.seeding import mixed_seed
from flextok.training import run as run_module
from flextok.training.checkpoints import read_checkpoint
from flextok.training.objective import RectifiedFlowObjective

PATIENCE = 180  # seconds after which processes hang, rather than being slow

# Three batches per epoch, so that a dozen steps cross several ends of an epoch.
SMALL = (
    "model=tiny",
    "vae=pixel",
    "data=digits",
    "data.image_size=8",
    "data.batch_size=400",
    "data.eval_batch_size=32",
    "size.encoder_depth=1",
    "size.decoder_depth=2",
    "size.encoder_width=32",
    "size.decoder_width=32",
    "size.head_dim=32",
    "size.registers=4",
    "size.intermediate_layer=0",
    "trainer.accelerator=cpu",
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "optimizer.warmup_steps=2",
    "optimizer.total_steps=8",
    "callbacks.last.every_n_steps=3",
    "callbacks.pictures.timesteps=2",
    "callbacks.pictures.num_images=2",
)


def small_config(folder: Path, *overrides: str) -> DictConfig:
    """The config of such a run, which lies in `folder`."""
    cfg = compose([*SMALL, *overrides])
    OmegaConf.update(cfg, "paths.run", str(folder))
    return cfg


def load(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return read_checkpoint(folder / "checkpoints" / name)


def run_with(cfg: DictConfig, callback: Any) -> dict[str, float]:
    """Run with one more callback, which comes before all others."""
    build_trainer = run_module._build_trainer

    def with_callback(cfg, own):
        trainer = build_trainer(cfg, own)
        trainer.callbacks.insert(0, callback)
        return trainer

    with mock.patch.object(run_module, "_build_trainer", with_callback):
        return run_module.run(cfg)


class At(Callback):
    """Does something at a place of one step: `before`, `within`, `in the update`, `after`, `in validation`."""

    def __init__(self, step, place, act):
        self.step, self.place, self.act = step, place, act

    def _at(self, trainer, place):
        if (trainer.global_step, place) == (self.step, self.place) and not trainer.sanity_checking:
            self.act()

    def on_train_start(self, trainer, *args):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._at(trainer, "in the update"))

    def on_train_batch_start(self, trainer, *args):
        self._at(trainer, "before")

    def on_after_backward(self, trainer, *args):
        self._at(trainer, "within")

    def on_train_batch_end(self, trainer, *args):
        self._at(trainer, "after")

    def on_validation_batch_end(self, trainer, *args):
        self._at(trainer, "in validation")


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv` without those numbers that no two runs share."""
    with (folder / "metrics.csv").open() as file:
        return [repeatable(row) for row in csv.DictReader(file)]


def repeatable(numbers: dict[str, Any]) -> dict[str, Any]:
    """Those numbers of a run that depend on its config alone."""
    of_the_machine = (
        *("train/images_per_second", "train/tokens_per_second", "train/step_seconds", "train/data_wait_share"),
        "memory/host_peak_gib",
    )
    return {name: value for name, value in numbers.items() if name not in of_the_machine}


def assert_same_result(folder: Path, expected: Path) -> None:
    """The newest checkpoints of two runs are equal in all that training goes on from."""
    ours, theirs = load(folder), load(expected)
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step"):
        assert largest_difference(ours[part], theirs[part]) == 0.0, part


def largest_difference(a: Any, b: Any) -> float:
    """The largest difference of any number in two nested containers of equal shape."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple):
        return max((largest_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, int | float):
        return abs(a - b)
    assert a == b
    return 0.0


class DrawsOfEachImage(RectifiedFlowObjective):
    """Feeds the random numbers in: each image has its own, whichever process it is in."""

    def __call__(self, model, data):
        images = data[model.vae.images_read_key]
        seeds = [mixed_seed(crc32(image.contiguous().numpy().tobytes())) for image in images]
        return super().__call__(model, {**data, RNG_KEY: [torch.Generator().manual_seed(seed) for seed in seeds]})


class KillAt(Callback):
    """Every process of the run dies without a word."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def task_of_slurm(rank, world_size):
    """What srun tells a task. Lightning reads it, and knows that it need not start processes."""
    return {
        **{"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost"},
        **{"SLURM_NTASKS": str(world_size), "SLURM_NTASKS_PER_NODE": str(world_size), "SLURM_NODEID": "0"},
        **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
    }


def process(rank, world_size, port, folder, overrides, under_slurm):
    # Where it hangs, if it does.
    faulthandler.dump_traceback_later(PATIENCE - 20, file=(folder / f"rank_{rank}.hang").open("w"))
    tells = task_of_slurm(rank, world_size) if under_slurm else {"LOCAL_RANK": str(rank)}
    os.environ.update(tells, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    logging.basicConfig(filename=folder / f"rank_{rank}.log", level=logging.INFO)
    run_module.run(small_config(folder, *overrides, f"trainer.devices={world_size}"))


def launch(folder, *overrides, world_size=2, under_slurm=False):
    """Run so many processes to their end and return their exit codes.

    They are forked from a process that has imported everything, and so start at once.
    """
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flextok.training.run"])
    port = find_free_network_port()
    processes = [
        context.Process(target=process, args=(rank, world_size, port, folder, overrides, under_slurm))
        for rank in range(world_size)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(timeout=PATIENCE)
    hanging = [each for each in processes if each.is_alive()]
    for each in hanging:
        each.kill()
    for file in folder.glob("rank_*.hang"):
        if not file.stat().st_size:
            file.unlink()
    assert not hanging, f"{len(hanging)} processes hang; see {folder}/rank_*.log and rank_*.hang"
    return [each.exitcode for each in processes]
