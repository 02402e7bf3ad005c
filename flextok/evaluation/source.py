"""Which model is meant by `checkpoint=...`, where does it belong, and which file holds its weights?

A run folder, a Lightning checkpoint, an exported safetensors file, an exported folder, `latest`, or a model that comes
with the package, `embedded:photos`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from flextok.embedded import PREFIX, embedded_model, embedded_models
from flextok.utils.config_safety import DATA_TARGETS, sanitize_hydra_config

EXPORT_FILES = ("config.json", "model.safetensors")
VALID = (
    "a run folder, a .ckpt file of one, a .safetensors file, an exported folder (config.json and "
    "model.safetensors), latest, embedded:digits, or embedded:photos"
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that exists on disk and is not loaded yet."""

    path: Path
    kind: str  # "run", "checkpoint", "export" or "file"
    run_folder: Path | None

    @property
    def default_output_dir(self) -> Path:
        """`<run>/evaluation`, `<exported folder>/evaluation`, or `<name>_evaluation` beside a bare file.

        Of a model that comes with the package, whose folder is not the user's, it is `<name>_evaluation` here.
        """
        if self.path in embedded_models().values():
            return Path(f"{self.path.name}_evaluation")
        if self.kind == "file" or (self.kind == "checkpoint" and self.run_folder is None):
            return self.path.with_name(f"{self.path.stem}_evaluation")
        return (self.run_folder or self.path) / "evaluation"

    @cached_property  # A run that goes on replaces its newest, and what is whole takes reading all of it.
    def weights_file(self) -> Path:
        """The file the weights are read from; of a run the newest that is whole."""
        if self.kind == "run":
            from flextok.training.checkpoints import checkpoint_of_run

            return checkpoint_of_run(self.path)
        return self.path / "model.safetensors" if self.kind == "export" else self.path

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The config of the run, as untrusted as the run itself; None where there is no run."""
        if self.kind not in ("run", "checkpoint"):
            return None
        from flextok.training.checkpoints import run_config

        return dict(OmegaConf.to_container(run_config(self.path), resolve=False))  # type: ignore[arg-type]

    def run_data(self) -> dict[str, Any] | None:
        """The `data` node of the run, or None where there is no run; it names none but our own data modules."""
        if self.config is None:
            return None
        try:
            data = sanitize_hydra_config({"data": self.config.get("data")}, allowed=DATA_TARGETS)["data"]
            if not isinstance(data, dict) or "_target_" not in data:
                raise ValueError("config, data: there is no data module")
            # The webdataset library hands what follows to a shell.
            if "pipe:" in str(data):
                raise ValueError("config, data: a URL that begins with pipe: is a command, and is not run unasked")
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; or choose the data yourself, data=<group>") from error
        return data

    def load(self, *, weights: Literal["ema", "raw"]) -> tuple[Any, str]:
        """The FlexTok model on the CPU, and which weights it has: `ema`, `raw` or `as exported`.

        A run without a moving average has only raw weights, an export only those it was made with.
        """
        if self.kind in ("run", "checkpoint"):
            return _load_from_run(self.weights_file, weights)
        if weights != "ema":
            raise ValueError(
                f"evaluation.weights={weights!r}: {self.path} holds one set of weights; valid is ema, which "
                "leaves them as they were exported, or a run folder to choose from"
            )
        if self.kind == "export":
            from flextok.flextok_wrapper import FlexTokFromHub

            return FlexTokFromHub.from_pretrained(str(self.path)).eval(), "as exported"
        from flextok.utils.checkpoint import load_model_from_safetensors

        return load_model_from_safetensors(self.path), "as exported"


def find_source(checkpoint: str, *, runs: Path) -> ModelSource:
    """Tell what `checkpoint` names; `latest` is the newest run with a checkpoint below the folder `runs`."""
    if checkpoint == "latest":
        newest = latest_run(runs)
        return ModelSource(path=newest, kind="run", run_folder=newest)
    if checkpoint.startswith(PREFIX):
        return ModelSource(path=embedded_model(checkpoint.removeprefix(PREFIX)), kind="export", run_folder=None)
    from flextok.training.run_folder import CONFIG
    from flextok.training.sharded_checkpoint import is_sharded_checkpoint

    path = Path(checkpoint)
    if not path.exists():
        raise ValueError(f"checkpoint={checkpoint}: does not exist; valid are {VALID}")
    # Links are followed: a `best.ckpt` that points into a run belongs to that run.
    path = path.resolve()
    if is_sharded_checkpoint(path) or (path.suffix == ".ckpt" and not path.is_dir()):
        # What reads runs takes seconds to import, and an export does without.
        from flextok.training.checkpoints import run_folder_of

        return ModelSource(path=path, kind="checkpoint", run_folder=run_folder_of(path))
    if path.is_dir():
        if (path / CONFIG).is_file():
            return ModelSource(path=path, kind="run", run_folder=path)
        if all((path / name).is_file() for name in EXPORT_FILES):
            return ModelSource(path=path, kind="export", run_folder=None)
    elif path.suffix == ".safetensors":
        return ModelSource(path=path, kind="file", run_folder=None)
    raise ValueError(f"checkpoint={checkpoint}: not a model; valid are {VALID}")


def latest_run(runs: Path) -> Path:
    """The run below `runs`, sweeps included, that holds the newest checkpoint of all."""
    from flextok.training.run_folder import CHECKPOINTS, CONFIG

    found = [path for path in runs.glob(f"**/{CHECKPOINTS}/*.ckpt") if (path.parents[1] / CONFIG).is_file()]
    if not found:
        raise ValueError(f"checkpoint=latest: no run with a checkpoint below {runs}; valid are {VALID}")
    return max(found, key=lambda path: path.stat().st_mtime).parents[1].resolve()


def _load_from_run(file: Path, weights: Literal["ema", "raw"]) -> tuple[Any, str]:
    from flextok.training.checkpoints import load_run, read_checkpoint
    from flextok.training.ema import CHECKPOINT_KEY

    model, _ = load_run(file, weights=weights)
    has_average = CHECKPOINT_KEY in read_checkpoint(file, values=False)
    return model, weights if has_average else "raw"
