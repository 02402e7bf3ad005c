"""A run of a few steps on the embedded digits, in one process or several, and what may happen to it."""

import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from lightning import Callback
from omegaconf import DictConfig, OmegaConf

from flextok.config import compose
from flextok.model.data_dict import RNG_KEY
from flextok.seeding import mixed_seed
from flextok.training.checkpoints import read_checkpoint
from flextok.training.objective import RectifiedFlowObjective
from flextok.training.run import run

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


def process(rank, world_size, port, folder, overrides):
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    logging.basicConfig(filename=folder / f"rank_{rank}.log", level=logging.INFO)
    run(small_config(folder, *overrides, f"trainer.devices={world_size}"))


def launch(folder, *overrides, world_size=2):
    """Run so many processes to their end and return their exit codes.

    They are forked from a process that has imported everything, and so start at once.
    """
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flextok.training.run"])
    port = find_free_network_port()
    processes = [
        context.Process(target=process, args=(rank, world_size, port, folder, overrides)) for rank in range(world_size)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(timeout=PATIENCE)
    hanging = [each for each in processes if each.is_alive()]
    for each in hanging:
        each.kill()
    assert not hanging, f"{len(hanging)} processes hang; see {folder}/rank_*.log"
    return [each.exitcode for each in processes]
