"""What a run writes down about itself: the config it resolved to, and where and with what it ran."""

import json
import logging
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from flextok.provenance import git_revision, package_versions
from flextok.utils.checkpoint import atomic_path

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
RUN_INFO = "run_info.json"
CHECKPOINTS = "checkpoints"
WANDB_ID = "wandb_id"


def write_run_record(folder: Path, cfg: DictConfig, *, wandb_id: str | None) -> None:
    """Write `config.yaml` (resolved) and `run_info.json` into the run folder.

    Raises:
        ValueError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / CONFIG) as path:
            path.write_text(OmegaConf.to_yaml(cfg, resolve=True))
        with atomic_path(folder / RUN_INFO) as path:
            info = {**collect_run_info(seed=cfg.seed), WANDB_ID: wandb_id}
            path.write_text(json.dumps(info, indent=2) + "\n")
        if (folder / CHECKPOINTS).exists():  # A run that goes on; somebody else may have made it.
            with tempfile.TemporaryFile(dir=folder / CHECKPOINTS):
                pass
    except OSError as error:
        raise ValueError(
            f"paths.run={str(folder)!r} cannot be written to ({error.strerror}: {error.filename}); valid: "
            "hydra.run.dir=<a folder that can be made or written to>"
        ) from error


def stored_wandb_id(folder: Path) -> str | None:
    """The wandb run that a run folder says it wrote to, if it does."""
    try:
        info = json.loads((folder / RUN_INFO).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): wandb starts a new run", folder / RUN_INFO, error)
        return None
    name = info.get(WANDB_ID) if isinstance(info, dict) else None
    return name if isinstance(name, str) else None


def collect_run_info(*, seed: int) -> dict[str, Any]:
    """Return what one needs to repeat the run, besides its config."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
