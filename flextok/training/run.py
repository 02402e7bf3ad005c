"""From a config to a trained tokenizer: assemble the parts, fit, leave a run folder."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import lightning
from hydra.errors import InstantiationException
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from flextok.model.trunks.transformers import compile_blocks, set_attention_backend
from flextok.training.checkpoints import check_same_weights, checkpoint_of_run, read_checkpoint
from flextok.training.distributed import check_launch, check_one_folder
from flextok.training.ema import CHECKPOINT_KEY, ExponentialMovingAverage
from flextok.training.fsdp import CheckpointFiles
from flextok.training.initialize import initialize_from
from flextok.training.random_states import RandomStates
from flextok.training.run_folder import write_run_record
from flextok.training.tokenizer_module import TokenizerModule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Everything a config turns into."""

    trainer: Trainer
    module: TokenizerModule
    data: LightningDataModule


class OneFolder(Callback):
    """Stops a run whose processes would write into different folders, as soon as they can ask each other."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_one_folder(self.folder)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train as the config says and return the last value of every metric.

    The config is not checked here: `train.py` does so before it waits for torch to be imported. From Python call
    `flextok.config.check_config` first. With several processes each of them runs all of this: what must happen once
    is left to rank 0.
    """
    _calm_lightning()
    resume_from = None if cfg.ckpt_path is None else checkpoint_of_run(cfg.ckpt_path)
    training = build(cfg)
    if not training.trainer.is_global_zero:
        logging.getLogger().setLevel(logging.WARNING)  # Once is enough to read that things go well.
    if resume_from is not None:
        _check_resume(cfg, resume_from, training.module)
    rank_zero_only(write_run_record)(Path(cfg.paths.run), cfg)
    training.trainer.fit(training.module, datamodule=training.data, ckpt_path=resume_from, weights_only=True)
    return {name: float(value) for name, value in training.trainer.callback_metrics.items()}


def build(cfg: DictConfig) -> TrainingRun:
    """Assemble model, data and trainer; writes nothing."""
    trainer = _build_trainer(cfg)  # First: a missing accelerator is found before a large model is built.
    check_launch(trainer)
    lightning.seed_everything(cfg.seed, workers=True)
    model = _instantiate(cfg.model)
    initialize_from(cfg, model)
    set_attention_backend(model, cfg.attention.backend)
    if cfg.compile:
        compile_blocks(model)
    module = TokenizerModule(
        model,
        _instantiate(cfg.objective),
        _instantiate(cfg.optimizer),
        seed=cfg.seed,
        keep_ks=cfg.validation.keep_ks,
        num_sigmas=cfg.validation.num_sigmas,
    )
    # Plain containers: a DictConfig in a checkpoint does not load with `weights_only=True`.
    module.save_hyperparameters(OmegaConf.to_container(cfg, resolve=True))
    return TrainingRun(trainer=trainer, module=module, data=_instantiate(cfg.data))


def _calm_lightning() -> None:
    """Leave logging to Hydra, where Lightning's own handlers say everything twice, and drop what nobody can act on."""
    if logging.getLogger().hasHandlers():
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    # Lightning 2.6 builds a class that torch 2.13 deprecates.
    deprecated = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, module=r"lightning\.pytorch\.utilities\._pytree")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "installing [litlogger]" not in record.getMessage()


def _build_trainer(cfg: DictConfig) -> Trainer:
    callbacks: list[Callback] = _instantiate_all(cfg.callbacks)
    try:
        return _instantiate(
            cfg.trainer,
            # Not part of the config: without it a resumed run would silently not be exact.
            callbacks=[OneFolder(cfg.paths.run), RandomStates(cfg.seed), *callbacks],
            plugins=[CheckpointFiles()],
            logger=_instantiate_all(cfg.logger) or False,
            default_root_dir=cfg.paths.run,
            # False must be said: otherwise Lightning adds a bar of its own, in log files too, and checkpoints.
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        )
    except InstantiationException as error:
        if not isinstance(error.__cause__, MisconfigurationException | ValueError | ImportError):
            raise
        names = ("accelerator", "devices", "strategy", "precision")
        chosen = {name: cfg.trainer[name] for name in names if name in cfg.trainer}
        if isinstance(chosen.get("strategy"), DictConfig):
            chosen["strategy"] = chosen["strategy"].get("_target_", "").rpartition(".")[2]
        options = ", ".join(f"trainer.{name}={value!r}" for name, value in chosen.items())
        valid = "valid on every machine: trainer=auto, trainer=cpu"
        reason = str(error.__cause__).rstrip(".!")
        raise ValueError(f"{options} cannot be used together here: {reason}; {valid}") from None


def _instantiate(node: Any, **options: Any) -> Any:
    return hydra.utils.instantiate(node, _convert_="all", **options)


def _instantiate_all(nodes: DictConfig | None) -> list[Any]:
    return [_instantiate(node) for node in (nodes or {}).values() if _is_chosen(node)]


def _is_chosen(node: DictConfig | None) -> bool:
    return node is not None and node.get("_target_") is not None


def _check_resume(cfg: DictConfig, resume_from: Path, module: TokenizerModule) -> None:
    """Refuse another model, and say how else the run differs: a forgotten override must not be silent.

    Raises:
        ValueError: the file holds no training checkpoint, or one of another model.
    """
    checkpoint = read_checkpoint(resume_from, values=False)
    if "state_dict" not in checkpoint or "loops" not in checkpoint:
        raise ValueError(f"ckpt_path={str(resume_from)!r} is no training checkpoint; for weights use init_from")
    valid = "the overrides of the run that is continued"
    source = f"ckpt_path={str(resume_from)!r}"
    check_same_weights(checkpoint["state_dict"], module.state_dict(), source=source, valid=valid)
    rank_zero_only(_report_changes)(cfg, resume_from, checkpoint)


def _report_changes(cfg: DictConfig, resume_from: Path, checkpoint: dict[str, Any]) -> None:
    logger.info("continuing from %s at step %d", resume_from, checkpoint["global_step"])
    if checkpoint["global_step"] >= cfg.trainer.max_steps:
        logger.warning("nothing is left to do: trainer.max_steps=%d", cfg.trainer.max_steps)
    old = _flatten(checkpoint.get("hyper_parameters", {}))
    new = _flatten(OmegaConf.to_container(cfg, resolve=True))
    for name in sorted(old.keys() | new.keys()):
        group = name.partition(".")[0]
        if group in ("paths", "ckpt_path", "callbacks", "logger", "experiment_name"):
            continue
        if old.get(name) != new.get(name):
            logger.warning("%s was %r, is now %r", name, old.get(name), new.get(name))
    has_ema = any(
        _is_chosen(node) and node["_target_"].endswith(ExponentialMovingAverage.__name__)
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
