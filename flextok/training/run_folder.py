"""What a run writes down about itself: the config it resolved to, and where and with what it ran."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from flextok.provenance import git_revision, package_versions
from flextok.utils.checkpoint import atomic_path

CONFIG = "config.yaml"
RUN_INFO = "run_info.json"
CHECKPOINTS = "checkpoints"


def write_run_record(folder: Path, cfg: DictConfig) -> None:
    """Write `config.yaml` (resolved) and `run_info.json` into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / CONFIG) as path:
        path.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    with atomic_path(folder / RUN_INFO) as path:
        path.write_text(json.dumps(collect_run_info(seed=cfg.seed), indent=2) + "\n")


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
