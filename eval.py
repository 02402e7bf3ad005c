"""Evaluate a model: `python eval.py checkpoint=runs/<experiment>/<time>`. Options: `configs/eval.yaml`."""

import os
import sys

import hydra
from omegaconf import DictConfig

from flextok.config import check_config, register_resolvers, run_command


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(config: DictConfig) -> None:
    from flextok.evaluation.report import format_table
    from flextok.evaluation.run import run

    check_config(config)
    metrics, folder = run(config)
    # Of several processes one tells.
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{format_table(metrics)}report: {folder}\n")


if __name__ == "__main__":
    register_resolvers()
    run_command(main)
