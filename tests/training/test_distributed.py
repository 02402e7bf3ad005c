"""Training with several processes: one folder, one result, whatever kills it."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.types import RunMode
from lightning import Callback

from flextok.model.data_dict import RNG_KEY
from flextok.training import distributed
from flextok.training.preemption import EXIT_CODE
from flextok.training.random_states import collect_random_states
from flextok.training.randomness import training_generator
from flextok.training.run import build, run
from tests.support import REPOSITORY
from tests.training.support import SMALL, largest_difference, launch, load, small_config
from tests.training.test_preemption import signal_at

HERE = "tests.training.test_distributed"
SUPPORT = "tests.training.support"
TWO = ("trainer=ddp_cpu", "data.batch_size=200", "callbacks.pictures=null", "callbacks.last.every_n_steps=2")


# --- what the processes run -------------------------------------------------------------------------------------------


def record_draws(model):
    """A list that every later step of the model adds to: what it drew."""
    draws = []

    def note(module, inputs, data):
        noise, times = data[module.noise_write_key].tensor.clone(), data[module.sigmas_write_key].clone()
        draws.append({"keep_k": list(data["sampled_keep_k"]), "noise": noise, "times": times})

    model.flow_matching_noise_module.register_forward_hook(note)
    return draws


class SaveDraws(Callback):
    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        self.draws = record_draws(pl_module.model)

    def on_train_end(self, trainer, pl_module):
        torch.save(self.draws, self.folder / f"draws_{trainer.global_rank}.pt")


class SaveGradients(Callback):
    def __init__(self, folder):
        self.folder = Path(folder)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        torch.save(gradients, self.folder / f"gradients_{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of two processes; each wrote down what its steps drew."""
    folder = tmp_path_factory.mktemp("undisturbed")
    record = f"+callbacks.draws={{_target_: {HERE}.SaveDraws, folder: {folder}}}"
    assert launch(folder, *TWO, record) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of the same run, killed in step 6, two steps into its second epoch; it was saved after step 4."""
    folder = tmp_path_factory.mktemp("killed")
    assert -signal.SIGKILL in launch(folder, *TWO, f"+callbacks.kill={{_target_: {SUPPORT}.KillAt, step: 5}}")
    assert load(folder)["global_step"] == 4
    return folder


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_two_halves_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    def overrides(folder):
        return (
            f"objective._target_={SUPPORT}.DrawsOfEachImage",
            f"+callbacks.gradients={{_target_: {HERE}.SaveGradients, folder: {folder}}}",
            "trainer.max_steps=1",
            "callbacks.pictures=null",
        )

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    run(small_config(one, *overrides(one)))
    assert launch(two, *TWO, *overrides(two)) == [0, 0]
    whole = torch.load(one / "gradients_0.pt")
    for rank in range(2):
        halves = torch.load(two / f"gradients_{rank}.pt")
        assert halves.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(halves[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert sum(gradient.abs().max() > 0 for gradient in whole.values()) > 1


def test_each_rank_draws_its_own_numbers_which_the_seed_alone_decides(undisturbed, tmp_path):
    module = build(small_config(tmp_path)).module
    model, again = module.model, record_draws(module.model)
    images = torch.zeros(200, 3, 8, 8).split(1)
    drawn = [torch.load(undisturbed / f"draws_{rank}.pt") for rank in range(2)]
    assert len(drawn[0]) == len(drawn[1]) == 8
    for step in range(8):
        for rank in range(2):
            rng = training_generator(0, step=step, micro_batch=0, rank=rank)
            module.objective(model, {model.vae.images_read_key: images, RNG_KEY: rng})
            assert largest_difference(again[-1], drawn[rank][step]) == 0.0
        assert all(largest_difference(drawn[0][step][name], drawn[1][step][name]) > 0 for name in drawn[0][step])


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("kill -9 of one of several processes")
def test_a_killed_run_of_two_processes_goes_on_exactly(undisturbed, killed, tmp_path):
    assert launch(tmp_path, *TWO, f"ckpt_path={killed}") == [0, 0]
    ours, theirs = load(tmp_path), load(undisturbed)
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step"):
        assert largest_difference(ours[part], theirs[part]) <= 1e-6, part
    assert "interrupted with" not in (tmp_path / "rank_0.log").read_text()


@pytest.mark.parametrize("under_slurm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(undisturbed, tmp_path, under_slurm):
    told = signal_at("within the step", 4, rank=1, signum=int(signal.SIGTERM))
    overrides = (*TWO, "callbacks.last.every_n_steps=100", "ckpt_path=auto")
    assert launch(tmp_path, *overrides, told, under_slurm=under_slurm) == [EXIT_CODE, 0]
    step = load(tmp_path)["global_step"]
    assert 5 <= step <= 7  # They ask each other one step ahead.
    assert f"after step {step}; to go on: the same command" in (tmp_path / "rank_0.log").read_text()
    assert launch(tmp_path, *overrides, under_slurm=under_slurm) == [0, 0]
    ours, theirs = load(tmp_path), load(undisturbed)
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step"):
        assert largest_difference(ours[part], theirs[part]) <= 1e-6, part
    assert f"at step {step}" in (tmp_path / "rank_0.log").read_text()


@pytest.mark.fault("another number of processes")
def test_a_run_goes_on_with_another_number_of_processes_and_says_what_that_changes(killed, tmp_path, caplog):
    run(small_config(tmp_path, f"ckpt_path={killed}", "data.batch_size=400", "callbacks.pictures=null"))
    assert load(tmp_path)["global_step"] == 8
    assert "interrupted with 2 processes and goes on with 1" in caplog.text
    assert len(states_of(tmp_path)) == 1


def test_the_random_states_of_all_ranks_are_stored(undisturbed):
    first, second = states_of(undisturbed)
    assert first.keys() == second.keys() == collect_random_states().keys()
    assert largest_difference(first["torch"], second["torch"]) > 0


def states_of(folder):
    (states,) = (state["ranks"] for name, state in load(folder)["callbacks"].items() if name.startswith("RandomStates"))
    return states


# --- one folder -------------------------------------------------------------------------------------------------------


def test_rank_zero_alone_writes_and_speaks(undisturbed):
    assert {path.name for path in undisturbed.iterdir()} == {
        *("config.yaml", "run_info.json", "metrics.csv", "checkpoints"),
        *("rank_0.log", "rank_1.log", "draws_0.pt", "draws_1.pt"),
    }
    assert "step 8/8" in (undisturbed / "rank_0.log").read_text()
    assert "step 8/8" not in (undisturbed / "rank_1.log").read_text()


@pytest.fixture
def trainer():
    return SimpleNamespace(num_devices=2, num_nodes=1)


def test_more_processes_than_the_trainer_uses_are_refused(trainer, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.check_launch(trainer)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"started 4 processes, but trainer.devices=2 with .*; valid: trainer=ddp"):
        distributed.check_launch(trainer)


def test_a_sweep_in_which_each_process_would_start_all_runs_is_refused(trainer, monkeypatch):
    hydra_config = SimpleNamespace(initialized=lambda: True, get=lambda: SimpleNamespace(mode=RunMode.MULTIRUN))
    monkeypatch.setattr(distributed, "HydraConfig", hydra_config)
    with pytest.raises(ValueError, match=r"^trainer.devices=2 .* cannot be used in this sweep .*; valid: one machine"):
        distributed.check_launch(trainer)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")  # There each process is a task of one run.
    distributed.check_launch(trainer)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    with pytest.raises(ValueError, match="hydra/launcher=slurm, which starts the processes"):
        distributed.check_launch(trainer)
    trainer.num_devices = 1
    distributed.check_launch(trainer)


def test_a_process_on_its_own_joins_nobody(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.join_run_folder() == []
    distributed.check_one_folder("runs/x")


def test_the_first_task_of_slurm_alone_writes_what_hydra_writes(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert distributed.join_run_folder() == []
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert distributed.join_run_folder() == ["hydra.job.name=train_rank_3", "hydra.output_subdir=null"]


def test_the_processes_of_torchrun_join_the_folder_of_rank_zero(monkeypatch):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(find_free_network_port()))
    store = torch.distributed.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    store.set("flextok/run_folder/0", "/data/it's a=b/2026")
    overrides = OverridesParser.create().parse_overrides(distributed.join_run_folder())
    values = {override.key_or_group: override.value() for override in overrides}
    assert values == {
        "hydra.run.dir": "/data/it's a=b/2026",
        "hydra.job.name": "train_rank_1",
        "hydra.output_subdir": None,
    }
    monkeypatch.setenv("RANK", "0")
    assert distributed.join_run_folder() == []


# --- as people start it -----------------------------------------------------------------------------------------------

FOUR_STEPS = (*SMALL, *TWO, "trainer.max_steps=4")


def start(*command, **environment):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=variables, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def finish(started, code=0):
    output, errors = started.communicate(timeout=150)
    assert started.returncode == code, output[-2000:] + errors[-2000:]
    return errors


def runs_below(folder):
    return [path.parent for path in folder.rglob("config.yaml") if path.parent.name != ".hydra"]


@pytest.mark.slow
def test_a_sweep_with_several_processes_per_run_is_one_folder_with_one_run_per_setting(tmp_path):
    sweep = ("data.batch_size=200,5000", f"hydra.sweep.dir={tmp_path / 'sweep'}", "optimized_metric=val/flow_loss")
    errors = finish(start(sys.executable, "train.py", "-m", *FOUR_STEPS, *sweep), code=2)
    assert "ended with exit code 2; its messages are above" in errors
    assert "data.batch_size is 5000" in errors
    finish(start(sys.executable, "train.py", *FOUR_STEPS, f"hydra.run.dir={tmp_path / 'alone'}"))
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == ["0", "1"]
    assert largest_difference(load(tmp_path / "sweep/0")["state_dict"], load(tmp_path / "alone")["state_dict"]) == 0.0
    with (tmp_path / "sweep/summary.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["status"], first["step"], second["status"]) == ("completed", "4", "failed")


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_lightnings_own_launch_in_one_folder(tmp_path):
    own, torchrun = tmp_path / "own", tmp_path / "torchrun"
    finish(start(sys.executable, "train.py", *FOUR_STEPS, f"paths.runs={own}"))
    agent = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finish(start(*agent, "train.py", *FOUR_STEPS, f"paths.runs={torchrun}"))
    for folder in (own, torchrun):
        assert len(list((folder / "default").iterdir())) == len(runs_below(folder)) == 1
    (ours,), (theirs,) = runs_below(own), runs_below(torchrun)
    assert largest_difference(load(ours)["state_dict"], load(theirs)["state_dict"]) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("folders", ["one", "several"])
def test_two_nodes_share_a_folder_or_are_told_to(tmp_path, folders):
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    two_nodes = (*FOUR_STEPS, "trainer=multi_node", "trainer.accelerator=cpu", "trainer.precision=32-true")
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    nodes = []
    for node in range(2):
        folder = tmp_path / ("shared" if folders == "one" else str(node))
        overrides = (*two_nodes, "trainer.devices=1", f"hydra.run.dir={folder}")
        nodes.append(start(sys.executable, "train.py", *overrides, NODE_RANK=str(node), **places))
    errors = [finish(node, code=0 if folders == "one" else 2) for node in nodes]
    if folders == "one":
        assert load(tmp_path / "shared")["global_step"] == 4
    else:
        assert all("the same hydra.run.dir=<folder> in every command" in text for text in errors)


@pytest.mark.slow
def test_sigterm_saves_the_last_completed_step(tmp_path):
    run_of_two = start(sys.executable, "train.py", *SMALL, *TWO, "trainer.max_steps=2000", f"hydra.run.dir={tmp_path}")
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        assert run_of_two.poll() is None
        time.sleep(0.01)
    run_of_two.send_signal(signal.SIGTERM)
    output, _ = run_of_two.communicate(timeout=60)
    assert "interrupted; continue with ckpt_path=" in output
    assert load(tmp_path)["global_step"] >= 2


@pytest.mark.slow
def test_a_rank_may_have_more_to_validate_than_another(tmp_path):
    # 256 images on three processes are 86, 85 and 85.
    uneven = ("data.batch_size=100", "data.eval_batch_size=85", "trainer.limit_val_batches=null")
    assert launch(tmp_path, *TWO, *uneven, "trainer.max_steps=4", world_size=3) == [0, 0, 0]


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(finished_run, tmp_path):
    assert launch(tmp_path, *TWO, f"ckpt_path={finished_run}", "trainer.max_steps=12") == [0, 0]
    assert load(tmp_path)["global_step"] == 12
    assert "interrupted with 1 processes and goes on with 2" in (tmp_path / "rank_0.log").read_text()
