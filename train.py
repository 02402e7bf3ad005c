"""Train a tokenizer: `python train.py experiment=digits`; every option of `configs/` can be overridden."""

import sys

import hydra
from omegaconf import DictConfig

from flextok.config import check_config, register_resolvers, run_command
from flextok.training.distributed import announce_run_folder, join_run_folder
from flextok.training.sweep_job import needs_own_command, run_own_command
from flextok.training.sweep_summary import optimized_metric


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Return `optimized_metric`, for sweepers."""
    register_resolvers()  # Again: in a job that a launcher submits this is where our code begins.
    check_config(cfg)
    announce_run_folder()
    if needs_own_command(cfg):
        run_own_command(__file__)
        return optimized_metric(cfg, {})
    from flextok.training.run import run  # Takes seconds: `--help` and mistakes should not wait for it.

    return optimized_metric(cfg, run(cfg))


if __name__ == "__main__":
    register_resolvers()
    sys.argv += join_run_folder()
    run_command(main)
