"""From a run folder or a checkpoint in it to a model, or to the point where training goes on."""

import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from yaml import YAMLError

from flextok.flextok_wrapper import FlexTok
from flextok.training.checkpoint_files import NEWEST_FIRST, is_regular
from flextok.training.ema import CHECKPOINT_KEY
from flextok.training.optim import belongs_to
from flextok.training.run_folder import CHECKPOINTS, CONFIG
from flextok.training.sharded_checkpoint import is_sharded_checkpoint, read_file, read_sharded
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
_VAE_IN_MEMORY = "model.vae.in_memory"


def load_run(path: str | Path, weights: Weights = "ema", *, trust: bool = False) -> tuple[FlexTok, DictConfig]:
    """Return the model of a run on the CPU, in eval mode, and the config of the run.

    The model is whole: a VAE that the run did not keep in memory is read from where its config says.

    Args:
        path: a run folder, see `read_newest`, or a `.ckpt` file inside one.
        weights: the moving average or the trained weights themselves; a run without EMA has only the latter.
        trust: build whatever the config names. Only for runs of one's own that hold modules of one's own: the config
            of somebody else's run can run any code.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} cannot be used; valid: 'ema', 'raw'")
    file, checkpoint = read_newest(path)
    cfg = run_config(file, checkpoint)
    has_vae = OmegaConf.select(cfg, _VAE_IN_MEMORY) is not False
    if not has_vae:
        OmegaConf.update(cfg, _VAE_IN_MEMORY, True)
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
    expected = model.state_dict()
    if not has_vae:
        vae = {name: tensor for name, tensor in expected.items() if belongs_to(name, "vae")}
        weights_of_model = vae | weights_of_model
    check_same_weights(weights_of_model, expected, source=f"{file}", valid="the config of the run itself")
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


def read_newest(path: str | Path, *, values: bool = True) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint a path means, and its content: the file itself, or the newest whole one of a run folder.

    Those that the run wrote regularly come first, then its best. Each that is newer but damaged is a warning. `values`
    as for `read_checkpoint`: with or without, all of a checkpoint is verified.

    Raises ValueError, saying what is wrong with each, if none can be read.
    """
    path = Path(path).expanduser()
    if path.is_file() or is_sharded_checkpoint(path):
        return path, read_checkpoint(path, values=values)
    files = _checkpoints_in(path / CHECKPOINTS)
    if not files:
        raise ValueError(f"{path}: no checkpoint; valid: a .ckpt file, or a run folder with {CHECKPOINTS}/*.ckpt")
    damages: list[str] = []
    for file in files:
        try:
            checkpoint = _read(file, values=values)
        except _Damaged as error:
            damages.append(str(error))
            continue
        for damage in damages:
            logger.warning("%s; taking %s, written after step %s", damage, file.name, checkpoint.get("global_step"))
        return file, checkpoint
    raise ValueError(f"{path}: none of its checkpoints can be used: {'; '.join(damages)}")


def checkpoint_of_run(path: str | Path) -> Path:
    """Return the file of `read_newest`, which see."""
    return read_newest(path, values=False)[0]


def read_checkpoint(file: Path, *, values: bool = True, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Load a checkpoint without running code from it; tensors of a file stay on disk until they are used.

    Those of a sharded one are read whole, or with a mesh what this process is due of them; without `values` they are
    on the meta device instead, shapes alone.

    Raises ValueError, with what to do, if it is cut short or damaged anywhere.
    """
    try:
        return _read(file, values=values, mesh=mesh)
    except _Damaged as error:
        others = [other.name for other in _checkpoints_in(file.parent) if other != file]
        hint = f"others here: {', '.join(others)}" if others else "there is no other in its folder"
        if others and file.parent.name == CHECKPOINTS:
            hint += f"; given its run folder, {file.parent.parent}, the newest whole one is taken"
        raise ValueError(f"{error}; {hint}") from error


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
        try:
            return _checked(OmegaConf.load(folder / CONFIG), folder / CONFIG)
        except (OSError, ValueError, YAMLError) as error:
            reason = " ".join(str(error).split())
            logger.warning("%s is damaged (%s): taking the copy in the checkpoint", folder / CONFIG, reason)
    carried = (checkpoint or read_newest(path, values=False)[1]).get("hyper_parameters")
    return _checked(OmegaConf.create(carried if isinstance(carried, dict) else {}), path)


def _checked(config: Any, source: Path) -> DictConfig:
    if not isinstance(config, DictConfig) or not isinstance(config.get("model"), DictConfig):
        raise ValueError(
            f"{source} has no config of a run; valid: a run folder with {CONFIG}, or a .ckpt that it wrote"
        )
    return config


class _Damaged(ValueError):
    """A file that is no whole checkpoint."""


def _read(file: Path, *, values: bool, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    try:
        checkpoint = read_sharded(file, values=values, mesh=mesh) if file.is_dir() else read_file(file)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
        return checkpoint
    except _READ_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise _Damaged(f"{file} cannot be read, it may be cut short or damaged ({reason})") from error


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


def _time_of_writing(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # A run that goes on has just moved it.


def _checkpoints_in(folder: Path) -> list[Path]:
    """Those of a folder, the newest of the regular ones first."""
    times = {file: _time_of_writing(file) for file in folder.glob("*.ckpt")}
    # A copy of a run may have lost its times: the names say which of these is newer.
    chain = [folder / name for name in NEWEST_FIRST if folder / name in times]
    times.update(zip(chain, sorted((times[file] for file in chain), reverse=True), strict=True))
    order = [*chain, *sorted(times.keys() - set(chain))]  # Where times are equal.
    return sorted(order, key=lambda file: (is_regular(file), times[file]), reverse=True)
