"""Going on with a run: from which checkpoint, and whether it is the same run."""

import logging
from pathlib import Path
from typing import Any, TypeAlias

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from flextok.training.checkpoints import check_same_weights, read_newest
from flextok.training.ema import CHECKPOINT_KEY, ExponentialMovingAverage
from flextok.training.run_folder import CHECKPOINTS

logger = logging.getLogger(__name__)

AUTO = "auto"
Changes: TypeAlias = dict[str, tuple[Any, Any]]  # a setting: what it was, what it is now


def checkpoint_to_resume(ckpt_path: str | None, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run in `folder` starts from, and its content, of a sharded one only the shapes.

    `auto` is the newest whole one in that folder, if there is one.
    """
    has_checkpoints = any((folder / CHECKPOINTS).glob("*.ckpt"))
    if ckpt_path == AUTO:
        return read_newest(folder, values=False) if has_checkpoints else None
    if ckpt_path is None and has_checkpoints:
        logger.warning("a new run replaces the one in %s; ckpt_path=auto would go on with it", folder)
    return None if ckpt_path is None else read_newest(ckpt_path, values=False)


def check_resume(cfg: DictConfig, resume_from: Path, checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Refuse another model, and say how else the run differs: a forgotten override must not be silent.

    Raises:
        ValueError: the file holds no training checkpoint, or one of another model; or, where `ckpt_path=auto` found it,
            one of a run with other settings.
    """
    if "state_dict" not in checkpoint or "loops" not in checkpoint:
        raise ValueError(f"ckpt_path={str(resume_from)!r} is no training checkpoint; for weights use init_from")
    valid = "the overrides of the run that is continued"
    source = f"ckpt_path={str(resume_from)!r}"
    check_same_weights(checkpoint["state_dict"], module.state_dict(), source=source, valid=valid)
    changed = _changes(
        _flatten(checkpoint.get("hyper_parameters", {})), _flatten(OmegaConf.to_container(cfg, resolve=True))
    )
    if cfg.ckpt_path == AUTO:
        _refuse_another_run(changed, cfg.paths.run)
    rank_zero_only(_report_changes)(cfg, resume_from, checkpoint, changed)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    places = ("paths", "ckpt_path", "callbacks", "logger", "experiment_name", "optimized_metric")
    names = [name for name in sorted(old.keys() | new.keys()) if name.partition(".")[0] not in places]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _refuse_another_run(changed: Changes, folder: str) -> None:
    # Otherwise the second sweep in a folder would take the results of the first for its own. Another number of
    # machines is fine, and so is a setting that only a newer version has.
    for name, (before, now) in changed.items():
        if not name.startswith("trainer.") and before is not None:
            raise ValueError(
                f"ckpt_path=auto finds a run with other settings in {folder}: {name} was {before!r}, is now {now!r}; "
                f"valid: its settings, another folder, or ckpt_path={folder} to go on all the same"
            )


def _report_changes(cfg: DictConfig, resume_from: Path, checkpoint: dict[str, Any], changed: Changes) -> None:
    logger.info("continuing from %s at step %d", resume_from, checkpoint["global_step"])
    if checkpoint["global_step"] >= cfg.trainer.max_steps:
        logger.warning("nothing is left to do: trainer.max_steps=%d", cfg.trainer.max_steps)
    for name, (before, now) in changed.items():
        logger.warning("%s was %r, is now %r", name, before, now)
    has_ema = any(
        node is not None and (node.get("_target_") or "").endswith(ExponentialMovingAverage.__name__)
        for node in (cfg.callbacks or {}).values()
    )
    if CHECKPOINT_KEY in checkpoint and not has_ema:
        logger.warning("the checkpoint holds an EMA, this run keeps none: only its raw weights go on")


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
