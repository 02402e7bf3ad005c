"""From a run folder or a checkpoint in it to a model, or to the point where training goes on."""

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flextok.flextok_wrapper import FlexTok
from flextok.training.ema import CHECKPOINT_KEY
from flextok.training.run_folder import CHECKPOINTS, CONFIG

logger = logging.getLogger(__name__)

Weights = Literal["ema", "raw"]
# What unpickling damaged data raises depends on which byte is wrong.
_READ_ERRORS = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, zipfile.BadZipFile),
    *(KeyError, IndexError, ValueError, TypeError, AttributeError),
)
_MODEL_PREFIX = "model."  # FlexTok's attribute in TokenizerModule


def load_run(path: str | Path, weights: Weights = "ema") -> tuple[FlexTok, DictConfig]:
    """Return the model of a run on the CPU, in eval mode, and the resolved config of the run.

    Args:
        path: a run folder (its newest regular checkpoint is taken) or a `.ckpt` file inside one.
        weights: the moving average or the trained weights themselves; a run without EMA has only the latter.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} cannot be used; valid: 'ema', 'raw'")
    file = checkpoint_of_run(path)
    checkpoint = read_checkpoint(file)
    cfg = run_config(file, checkpoint)
    state = dict(checkpoint["state_dict"])
    if weights == "ema":
        if CHECKPOINT_KEY in checkpoint:
            state.update(checkpoint[CHECKPOINT_KEY]["weights"])
        else:
            logger.warning("%s was trained without EMA: using its only weights", file)
    # Not through the allow-list of exported files: one's own runs may contain one's own modules.
    model = hydra.utils.instantiate(cfg.model, _convert_="all")
    weights_of_model = {
        name.removeprefix(_MODEL_PREFIX): t for name, t in state.items() if name.startswith(_MODEL_PREFIX)
    }
    check_same_weights(weights_of_model, model.state_dict(), source=f"{file}", valid="the config of the run itself")
    model.load_state_dict(weights_of_model)
    return model.eval(), cfg


def check_same_weights(
    stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, valid: str
) -> None:
    """Raise ValueError naming some of the weights whose name or shape differs between a file and a model."""
    wrong = sorted(stored.keys() ^ expected.keys()) + [
        f"{name} ({list(stored[name].shape)}, here {list(expected[name].shape)})"
        for name in sorted(stored.keys() & expected.keys())
        if stored[name].shape != expected[name].shape
    ]
    if wrong:
        examples = ", ".join(wrong[:3])
        raise ValueError(
            f"{source} holds another model: {len(wrong)} weights differ, such as {examples}; valid: {valid}"
        )


def checkpoint_of_run(path: str | Path) -> Path:
    """Return the file itself, or the newest one that the run in a folder wrote regularly, else its best."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    files = _checkpoints_in(path / CHECKPOINTS)
    if not files:
        raise ValueError(f"{path}: no checkpoint; valid: a .ckpt file, or a run folder with {CHECKPOINTS}/*.ckpt")
    regular = [file for file in files if file.name == "last.ckpt" or file.name.startswith("step_")]
    return max(regular or files, key=lambda file: file.stat().st_mtime)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Load a checkpoint without running code from it; tensors stay on disk until they are used."""
    try:
        # Loading checks no sums: flipped bits would become weights.
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except _READ_ERRORS as error:
        others = [str(other) for other in _checkpoints_in(file.parent) if other != file]
        hint = f"others here: {', '.join(others)}" if others else "there is no other in its folder"
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read, it may be cut short or damaged ({reason}); {hint}") from error


def run_config(file: Path, checkpoint: dict[str, Any]) -> DictConfig:
    """Return the resolved config of the run a checkpoint belongs to: beside it, else the copy it carries."""
    for folder in file.resolve().parents[:2]:
        if (folder / CONFIG).is_file():
            return OmegaConf.create(OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))  # type: ignore[return-value]
    if "hyper_parameters" not in checkpoint:
        raise ValueError(f"{file} has no config: there is no {CONFIG} in its folder or the one above")
    return OmegaConf.create(checkpoint["hyper_parameters"])


def _checkpoints_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"))
