"""A run of a few steps on the embedded digits."""

import csv
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omegaconf import DictConfig, OmegaConf

from flextok.config import compose
from flextok.training import run as run_module

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


# Numbers that no two runs share.
NOT_REPEATABLE = (
    *("train/images_per_second", "train/tokens_per_second", "train/step_seconds", "train/data_wait_share"),
    "memory/host_peak_gib",
)


def small_config(folder: Path, *overrides: str) -> DictConfig:
    """The config of such a run, which lies in `folder`."""
    cfg = compose([*SMALL, *overrides])
    OmegaConf.update(cfg, "paths.run", str(folder))
    return cfg


def load(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def run_with(cfg: DictConfig, callback: Any) -> dict[str, float]:
    """Run with one more callback, which comes before all others."""
    build_trainer = run_module._build_trainer

    def with_callback(cfg, own):
        trainer = build_trainer(cfg, own)
        trainer.callbacks.insert(0, callback)
        return trainer

    with mock.patch.object(run_module, "_build_trainer", with_callback):
        return run_module.run(cfg)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv` without `NOT_REPEATABLE`."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in NOT_REPEATABLE} for row in csv.DictReader(file)]


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
