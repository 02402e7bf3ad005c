"""From a run folder or a checkpoint in it to a model, or to the point where training goes on."""

import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flextok.flextok_wrapper import FlexTok
from flextok.training.ema import CHECKPOINT_KEY
from flextok.training.run_folder import CHECKPOINTS, CONFIG
from flextok.training.sharded_checkpoint import is_sharded_checkpoint, read_header, read_sharded
from flextok.utils.config_safety import sanitize_hydra_config
from flextok.utils.instantiate import build_model

logger = logging.getLogger(__name__)

Weights = Literal["ema", "raw"]
# What unpickling damaged data raises depends on which byte is wrong.
_READ_ERRORS = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, zipfile.BadZipFile),
    *(KeyError, IndexError, ValueError, TypeError, AttributeError),
)
_MODEL_PREFIX = "model."  # FlexTok's attribute in TokenizerModule


def load_run(path: str | Path, weights: Weights = "ema", *, trust: bool = False) -> tuple[FlexTok, DictConfig]:
    """Return the model of a run on the CPU, in eval mode, and the config of the run.

    Args:
        path: a run folder (its newest regular checkpoint is taken) or a `.ckpt` file inside one.
        weights: the moving average or the trained weights themselves; a run without EMA has only the latter.
        trust: build whatever the config names. Only for runs of one's own that hold modules of one's own: the config
            of somebody else's run can run any code.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} cannot be used; valid: 'ema', 'raw'")
    file = checkpoint_of_run(path)
    checkpoint = read_checkpoint(file)
    cfg = run_config(file, checkpoint)
    state = _tensors(checkpoint.get("state_dict"), file)
    if weights == "ema":
        if CHECKPOINT_KEY in checkpoint:
            state.update(_tensors(checkpoint[CHECKPOINT_KEY].get("weights"), file))
        else:
            logger.warning("%s was trained without EMA: using its only weights", file)
    weights_of_model = {
        name.removeprefix(_MODEL_PREFIX): t for name, t in state.items() if name.startswith(_MODEL_PREFIX)
    }
    if trust:
        model = hydra.utils.instantiate(cfg.model, _convert_="all")
    else:
        model = _build_untrusted(cfg, file, shapes={name: t.shape for name, t in weights_of_model.items()})
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
    if path.is_file() or is_sharded_checkpoint(path):
        return path
    files = checkpoints_in(path / CHECKPOINTS)
    if not files:
        raise ValueError(f"{path}: no checkpoint; valid: a .ckpt file, or a run folder with {CHECKPOINTS}/*.ckpt")
    regular = [file for file in files if file.name == "last.ckpt" or file.name.startswith("step_")]
    return max(regular or files, key=lambda file: file.stat().st_mtime)


def read_checkpoint(file: Path, *, values: bool = True, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Load a checkpoint without running code from it; tensors stay on disk until they are used.

    Those of a sharded one are read whole, or with a mesh what this process is due of them; without `values` they are
    on the meta device instead, shapes alone.
    """
    try:
        if is_sharded_checkpoint(file):
            return read_sharded(file, mesh) if values else read_header(file)
        # Loading checks no sums: flipped bits would become weights.
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except _READ_ERRORS as error:
        others = [str(other) for other in checkpoints_in(file.parent) if other != file]
        hint = f"others here: {', '.join(others)}" if others else "there is no other in its folder"
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read, it may be cut short or damaged ({reason}); {hint}") from error


def run_folder_of(path: Path) -> Path | None:
    """Return the run a folder is or a checkpoint lies in, or None for a checkpoint on its own."""
    folders = [path] if path.is_dir() and not is_sharded_checkpoint(path) else path.resolve().parents[:2]
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def run_config(path: Path, checkpoint: Mapping[str, Any] | None = None) -> DictConfig:
    """Return the config of the run that a folder is or a checkpoint belongs to, else the copy the checkpoint carries.

    It is as untrusted as the file it comes from. Interpolations are left alone, though training writes none.
    """
    folder = run_folder_of(path)
    if folder is not None:
        source, config = folder / CONFIG, OmegaConf.load(folder / CONFIG)
    else:
        source = path
        carried = (checkpoint or read_checkpoint(path, values=False)).get("hyper_parameters")
        config = OmegaConf.create(carried if isinstance(carried, dict) else {})
    if not isinstance(config, DictConfig) or not isinstance(config.get("model"), DictConfig):
        raise ValueError(
            f"{source} has no config of a run; valid: a run folder with {CONFIG}, or a .ckpt that it wrote"
        )
    return config


def _build_untrusted(cfg: DictConfig, file: Path, shapes: Mapping[str, Sequence[int]]) -> Any:
    try:
        config = sanitize_hydra_config(cfg.model)
    except ValueError as error:
        hint = "if the run is yours and has modules of your own, load_run(..., trust=True) in Python builds them"
        raise ValueError(f"{file}: {error}; {hint}") from error
    try:
        return build_model(config, shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _tensors(state: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file}: holds no weights; valid: a .ckpt file that training wrote")
    return dict(state)


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints in a folder, but those that were never completed."""
    return sorted(path for path in folder.glob("*.ckpt") if path.is_file() or is_sharded_checkpoint(path))
