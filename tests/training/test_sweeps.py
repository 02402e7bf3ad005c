"""Sweeps: the table over their runs, the search, and how SLURM is asked to run them."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.types import RunMode
from omegaconf import OmegaConf

from flextok.config import CONFIG_FOLDER, compose, register_resolvers
from flextok.training.sweep_summary import (
    OVER_SEEDS,
    STATUS,
    SUMMARY,
    format_rows,
    last_metrics,
    optimized_metric,
    over_seeds,
    write_summary,
)
from tests.support import REPOSITORY
from tests.training.support import SMALL, largest_difference, load


@pytest.fixture
def hydra():
    """Hydra as `train.py` has it, in this process."""
    singletons = Singleton.get_state()
    register_resolvers()
    yield Hydra.create_main_hydra2("train", create_config_search_path(str(CONFIG_FOLDER)))
    GlobalHydra.instance().clear()
    Singleton.set_state(singletons)


def sweep(hydra, task, folder, *overrides):
    quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none")
    return hydra.multirun("train", task, ["hydra.mode=MULTIRUN", f"hydra.sweep.dir={folder}", *quiet, *overrides])


def pretend(cfg):
    """A run that takes no time: its loss is its learning rate and a bit of its seed."""
    folder, loss = Path(HydraConfig.get().runtime.output_dir), 100 * cfg.optimizer.lr + cfg.seed
    (folder / "metrics.csv").write_text(f"step,train/loss,val/flow_loss\n1,9,\n2,{loss + 1},{loss}\n3,{loss + 2},\n")


def table(folder, name=SUMMARY):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_one_row_per_run_and_one_per_setting(hydra, tmp_path, caplog):
    caplog.set_level("INFO")
    sweep(hydra, pretend, tmp_path, "seed=0,1", "optimizer.lr=0.01,0.02", "ckpt_path=auto")
    rows = table(tmp_path)
    assert [(row["run"], row["seed"], row["optimizer.lr"]) for row in rows] == [
        *(("0", "0", "0.01"), ("1", "0", "0.02")),
        *(("2", "1", "0.01"), ("3", "1", "0.02")),
    ]
    assert {row["status"] for row in rows} == {"completed"}
    assert [float(row["val/flow_loss"]) for row in rows] == [1, 2, 2, 3]
    assert [float(row["train/loss"]) for row in rows] == [3, 4, 4, 5]  # the last there is
    assert "ckpt_path" not in rows[0]
    settings = table(tmp_path, OVER_SEEDS)
    assert [(row["optimizer.lr"], row["runs"], float(row["val/flow_loss mean"])) for row in settings] == [
        *(("0.01", "2", 1.5), ("0.02", "2", 2.5)),
    ]
    assert float(settings[0]["val/flow_loss std"]) == pytest.approx(math.sqrt(0.5))
    assert f"{tmp_path / SUMMARY}:\nrun  seed  optimizer.lr  status" in caplog.text


def test_a_failed_run_is_listed_and_the_others_of_the_sweep_too(hydra, tmp_path, caplog):
    """Hydra runs them all before it looks at what came of the first, and then calls nobody at the end."""

    def task(cfg):
        if cfg.seed == 1:
            raise RuntimeError("out of\nmemory")
        pretend(cfg)

    with pytest.raises(RuntimeError, match="out of"):
        sweep(hydra, task, tmp_path, "seed=0,1,2")
    assert [(row["status"], row["error"], row["val/flow_loss"]) for row in table(tmp_path)] == [
        *(("completed", "", "0.1"), ("failed", "out of memory", ""), ("completed", "", "2.1")),
    ]
    (setting,) = table(tmp_path, OVER_SEEDS)
    assert setting["runs"] == "2"
    assert "failed: out of memory" in caplog.text


def test_a_run_that_was_stopped_is_unfinished_even_if_it_was_completed_before(hydra, tmp_path):
    sweep(hydra, pretend, tmp_path, "seed=0,1")

    def task(cfg):
        if cfg.seed == 1:
            raise SystemExit(75)
        pretend(cfg)

    with pytest.raises(SystemExit):
        sweep(hydra, task, tmp_path, "seed=0,1")
    assert [row["status"] for row in write_summary(tmp_path)] == ["completed", "unfinished"]
    assert not (tmp_path / "1" / STATUS).exists()


def test_an_evaluation_adds_its_psnr(hydra, tmp_path):
    sweep(hydra, pretend, tmp_path, "seed=0,1")
    (tmp_path / "1" / "evaluation").mkdir()
    results = [{"keep_k": 1, "psnr": 10.0}, {"keep_k": 16, "psnr": 20.0}]
    (tmp_path / "1" / "evaluation" / "metrics.json").write_text(json.dumps({"results": results}))
    assert [row["psnr"] for row in write_summary(tmp_path)] == [None, 20.0]
    assert "20" in format_rows(write_summary(tmp_path))


def test_a_grid_gives_the_psnr_of_its_first_curve_and_says_which(tmp_path):
    def write_run(number, seed, steps):
        folder = tmp_path / str(number)
        for name in (".hydra", "evaluation"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / ".hydra/overrides.yaml").write_text(f"- seed={seed}\n")
        (folder / "status.json").write_text('{"status": "completed", "error": null}')
        results = [
            {"keep_k": keep_k, "steps": each, "guidance_scale": 1.0, "psnr": 10.0 * keep_k + each + seed}
            for each in steps
            for keep_k in (1, 2)
        ]
        (folder / "evaluation/metrics.json").write_text(json.dumps({"results": results}))

    write_run(0, 0, [5, 10])
    write_run(1, 1, [5])
    rows = write_summary(tmp_path)
    assert [row["psnr"] for row in rows] == [25.0, 26.0]
    assert {row["psnr at"] for row in rows} == {"keep_k=2 steps=5 guidance_scale=1.0"}
    (setting,) = over_seeds(rows)
    assert setting["psnr mean"] == 25.5
    assert setting["psnr at"] == "keep_k=2 steps=5 guidance_scale=1.0"
    # With other steps it is another number, which has no place in the same mean.
    write_run(1, 1, [10])
    (setting,) = over_seeds(write_summary(tmp_path))
    assert setting["runs"] == 2
    assert "psnr mean" not in setting


def test_a_single_run_writes_no_table(hydra, tmp_path):
    hydra.run("train", pretend, [f"hydra.run.dir={tmp_path / 'one'}", "hydra/job_logging=none"])
    assert not (tmp_path / SUMMARY).exists()
    assert not (tmp_path / "one" / STATUS).exists()


# --- the search -------------------------------------------------------------------------------------------------------


def searched(hydra, folder, task, *overrides):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweep(hydra, task, folder, "hparams_search=optuna", *overrides)
    return OmegaConf.load(folder / "optimization_results.yaml")


def trial(cfg):
    """Best at a learning rate of 5e-3; a run with a large one diverges, one with a long warm-up fails."""
    pretend(cfg)
    if cfg.optimizer.warmup_steps == 200:
        raise RuntimeError("the gradient was not finite")
    loss = math.nan if cfg.optimizer.lr > 1e-2 else abs(math.log(cfg.optimizer.lr / 5e-3))
    return optimized_metric(OmegaConf.merge(cfg, {"paths": {"run": "nowhere"}}), {"val/flow_loss": loss})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_search_survives_bad_trials_and_is_the_same_again(hydra, tmp_path):
    best = searched(hydra, tmp_path / "one", trial, "hydra.sweeper.n_trials=12", "experiment=digits")
    rows = table(tmp_path / "one")
    assert len(rows) == 12
    assert "failed" in {row["status"] for row in rows}
    assert any(float(row["optimizer.lr"]) > 1e-2 for row in rows)
    assert best.best_params["optimizer.warmup_steps"] != 200
    assert best.best_value < 0.5
    again = searched(hydra, tmp_path / "two", trial, "hydra.sweeper.n_trials=12", "experiment=digits")
    assert again == best


def test_the_metric_of_a_search_must_exist_and_be_finite(tmp_path, caplog):
    cfg = OmegaConf.create({"optimized_metric": "val/flow_los", "paths": {"run": str(tmp_path)}})
    with pytest.raises(ValueError, match=r"optimized_metric='val/flow_los' is no metric .* valid: val/flow_loss$"):
        optimized_metric(cfg, {"val/flow_loss": 1.0})
    cfg.optimized_metric = "val/flow_loss"
    assert optimized_metric(cfg, {"val/flow_loss": 1.0}) == 1.0
    assert optimized_metric(cfg, {"val/flow_loss": math.inf}) is None
    assert "the sweeper is told that the run failed" in caplog.text
    cfg.optimized_metric = None
    assert optimized_metric(cfg, {}) is None


def test_a_run_with_nothing_left_to_do_tells_what_it_had_found(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/flow_loss\n1,3\n2,2\n3,\n")
    assert last_metrics(tmp_path) == {"step": 3.0, "val/flow_loss": 2.0}
    cfg = OmegaConf.create({"optimized_metric": "val/flow_loss", "paths": {"run": str(tmp_path)}})
    assert optimized_metric(cfg, {}) == 2.0


# --- SLURM ------------------------------------------------------------------------------------------------------------


def test_a_job_of_slurm_gets_a_task_per_device_and_goes_back_into_the_queue(hydra, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from submitit.slurm.slurm import _make_sbatch_string

    overrides = ["hydra/launcher=slurm", "trainer=multi_node", "trainer.num_nodes=2", "trainer.devices=8"]
    cfg = hydra.compose_config("train", overrides, run_mode=RunMode.MULTIRUN, with_log_configuration=False)
    options = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    assert (options["nodes"], options["tasks_per_node"], options["gpus_per_node"]) == (2, 8, 8)
    script = _make_sbatch_string(
        command="true",
        folder=tmp_path,
        nodes=options["nodes"],
        ntasks_per_node=options["tasks_per_node"],
        gpus_per_node=options["gpus_per_node"],
        signal_delay_s=options["signal_delay_s"],
        additional_parameters=options["additional_parameters"],
    )
    lines = script.splitlines()
    for option in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}" in lines
    assert any(line.startswith("#SBATCH --signal=USR") and line.endswith("@120") for line in lines)


SRUN = """#!/bin/bash
echo "$@" > "$LOG/srun.txt"
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
echo "$@" > "$LOG/scontrol.txt"
"""


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (1, False), (os.EX_TEMPFAIL, True)])
def test_the_script_for_sbatch_requeues_what_a_signal_stopped(tmp_path, code, is_requeued):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    told = {"SLURM_JOB_ID": "4242", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    told |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path), "CODE": str(code)}
    script = REPOSITORY / "docs" / "slurm.sh"
    command = ["bash", script, "experiment=digits", "seed=1"]
    done = subprocess.run(command, env={**os.environ, **told}, check=False, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "scontrol.txt").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 4242\n"
    python, program, *overrides = (tmp_path / "srun.txt").read_text().split()
    assert (python, program) == ("python", "train.py")
    cfg = compose(overrides)
    assert (cfg.trainer.num_nodes, cfg.trainer.devices, cfg.seed, cfg.ckpt_path) == (2, 8, 1, "auto")
    assert "hydra.run.dir=runs/slurm/4242" in overrides


@pytest.mark.slow
def test_a_job_of_submitit_that_is_signalled_is_requeued_and_goes_on_exactly(tmp_path):
    """The nearest to SLURM without it: submitit's own requeueing, of a real process that it has started."""
    from tests.training.test_preemption import signal_at

    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    place = ("hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}", "ckpt_path=auto")
    signalled_or_not = (signal_at("within the step", 4), "callbacks.signal.step=4,100")
    command = [sys.executable, "train.py", "-m", *SMALL, *place, *signalled_or_not, "callbacks.last.every_n_steps=100"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [row["status"] for row in table(tmp_path)] == ["completed", "completed"]
    logs = [(tmp_path / run / "train.log").read_text() for run in ("0", "1")]
    assert ["stopped by SIGUSR1 after step 5" in log for log in logs] == [True, False]
    assert "last.ckpt at step 5" in logs[0]
    stopped, undisturbed = load(tmp_path / "0"), load(tmp_path / "1")
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step"):
        assert largest_difference(stopped[part], undisturbed[part]) == 0.0, part
    with (tmp_path / "0" / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(1, 9)]  # none twice
