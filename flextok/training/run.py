"""From a config to a trained tokenizer: assemble the parts, fit, leave a run folder."""

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import lightning
from hydra.errors import InstantiationException
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf import DictConfig, OmegaConf

from flextok.model.trunks.transformers import compile_blocks, set_attention_backend
from flextok.training.checkpoint_files import DurableCheckpointIO
from flextok.training.distributed import check_launch, check_one_folder, check_one_start
from flextok.training.initialize import initialize_from
from flextok.training.loggers import wandb_id
from flextok.training.mup import start_with_mup
from flextok.training.preemption import StopOnSignal
from flextok.training.random_states import RandomStates
from flextok.training.resume import AUTO, check_resume, checkpoint_to_resume
from flextok.training.run_folder import write_run_record
from flextok.training.tokenizer_module import TokenizerModule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Everything a config turns into."""

    trainer: Trainer
    module: TokenizerModule
    data: LightningDataModule
    resume_from: Path | None
    stop: StopOnSignal


class OneFolder(Callback):
    """Stops a run whose processes would write into different folders, as soon as they can ask each other.

    Or would go on from different checkpoints: some may not see yet what `ckpt_path=auto` finds.
    """

    def __init__(self, folder: str, resume_from: Path | None) -> None:
        self.folder = folder
        self.resume_from = resume_from

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_one_folder(self.folder)
        check_one_start(self.resume_from)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train as the config says and return the last value of every metric.

    The config is not checked here: `train.py` does so before it waits for torch to be imported. From Python call
    `flextok.config.check_config` first. With several processes each of them runs all of this: what must happen once
    is left to rank 0.
    """
    _calm_lightning()
    training = build(cfg)
    trainer, resume_from = training.trainer, training.resume_from
    if not trainer.is_global_zero:
        logging.getLogger().setLevel(logging.WARNING)  # Once is enough to read that things go well.
    if resume_from is None and cfg.ckpt_path == AUTO:
        logger.info("ckpt_path=auto: %s holds no checkpoint, so a new run starts", cfg.paths.run)
    rank_zero_only(write_run_record)(Path(cfg.paths.run), cfg, wandb_id=wandb_id(trainer.loggers))
    try:
        with training.stop.listening(), _explained_deaths(cfg), _settled_objects():
            trainer.fit(training.module, datamodule=training.data, ckpt_path=resume_from, weights_only=True)
    except SIGTERMException:
        training.stop.leave(trainer, cfg.paths.run)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@contextmanager
def _settled_objects() -> Iterator[None]:
    """Spare the garbage collector what is there before training: hundreds of thousands of objects that stay.

    Looking through them takes a tenth of a second each time, on every rank at another moment, and makes data workers
    copy the memory they share.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _explained_deaths(cfg: DictConfig) -> Iterator[None]:
    """Turn torch's words about a data worker that is gone into what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise ValueError(
            f"a data worker died ({' '.join(str(error).split())}), often for lack of memory: try fewer "
            f"data.num_workers or a smaller data.batch_size, and continue with ckpt_path={cfg.paths.run}"
        ) from error


def build(cfg: DictConfig) -> TrainingRun:
    """Assemble model, data and trainer, and see to it that they fit a run to be continued; writes nothing."""
    resume_from, checkpoint = checkpoint_to_resume(cfg.ckpt_path, Path(cfg.paths.run)) or (None, {})
    # Not part of the config: without them a resumed run would silently not be exact.
    stop = StopOnSignal()
    own = [stop, OneFolder(cfg.paths.run, resume_from), RandomStates(cfg.seed)]
    trainer = _build_trainer(cfg, own)  # First: a missing accelerator is found before a large model is built.
    check_launch(trainer)
    lightning.seed_everything(cfg.seed, workers=True)
    model = _instantiate(cfg.model)
    if cfg.mup_base_width is not None:
        start_with_mup(cfg, model)
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
    if resume_from is not None:
        check_resume(cfg, resume_from, checkpoint, module)
    data = _instantiate(cfg.data)
    return TrainingRun(trainer=trainer, module=module, data=data, resume_from=resume_from, stop=stop)


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
    # Steps are logged by their number in the run, however short its epochs are.
    warnings.filterwarnings("ignore", message=r"The number of training batches \(\d+\) is smaller than the logging")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "installing [litlogger]" not in record.getMessage()


def _build_trainer(cfg: DictConfig, own: list[Callback]) -> Trainer:
    callbacks: list[Callback] = _instantiate_all(cfg.callbacks)
    try:
        trainer: Trainer = _instantiate(
            cfg.trainer,
            callbacks=[*own, *callbacks],
            logger=_instantiate_all(cfg.logger) or False,
            default_root_dir=cfg.paths.run,
            # False must be said: otherwise Lightning adds a bar of its own, in log files too, and checkpoints.
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        )
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
        return trainer
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
