"""Signals, gradients and other processes that stop a run in the middle of a step."""

import json
import os
import signal

import pytest

from flextok.training.run import run
from flextok.training.saving import HeldSignals
from tests.faults.support import steps_on_disk
from tests.training.support import At, assert_same_result, run_with, small_config

ONE_WORKER = ("data.num_workers=1", "callbacks.pictures=null")


@pytest.fixture
def handlers():
    """Lightning ignores Ctrl-C after the first, for good."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.fault("Ctrl-C")
@pytest.mark.parametrize(
    ("step", "place", "saved"),
    [pytest.param(4, "within", 4, marks=pytest.mark.slow), (5, "in the update", 6)],
)
def test_ctrl_c_saves_the_last_completed_step(finished_run, tmp_path, handlers, step, place, saved):
    with pytest.raises(SystemExit):
        run_with(small_config(tmp_path), At(step, place, lambda: signal.raise_signal(signal.SIGINT)))
    assert steps_on_disk(tmp_path)["last.ckpt"] == saved
    run(small_config(tmp_path, f"ckpt_path={tmp_path}"))
    assert_same_result(tmp_path, finished_run)


@pytest.mark.fault("SIGTERM")
def test_sigterm_saves_the_step_that_it_struck(finished_run, tmp_path, handlers):
    with pytest.raises(SystemExit):
        run_with(small_config(tmp_path), At(4, "within", lambda: signal.raise_signal(signal.SIGTERM)))
    assert steps_on_disk(tmp_path)["last.ckpt"] == 5
    run(small_config(tmp_path, f"ckpt_path={tmp_path}"))
    assert_same_result(tmp_path, finished_run)


def test_held_signals_strike_when_they_are_let_go(handlers):
    signals = HeldSignals(signal.SIGINT)
    signals.hold()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signals.let_go()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signals.hold()
    signal.raise_signal(signal.SIGINT)
    signals.forget()
    signals.let_go()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def kill_workers():
    from multiprocessing import active_children

    workers = [child for child in active_children() if child.daemon]
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.fault("dead data worker")
def test_a_dead_worker_ends_the_run_with_the_last_completed_step_saved(finished_run, tmp_path):
    before = signal.getsignal(signal.SIGCHLD)
    message = r"a data worker died \(DataLoader worker .*data.num_workers .*continue with ckpt_path="
    with pytest.raises(ValueError, match=message):
        run_with(small_config(tmp_path, *ONE_WORKER), At(4, "within", kill_workers))
    signal.signal(signal.SIGCHLD, before)
    assert steps_on_disk(tmp_path)["last.ckpt"] >= 4
    run(small_config(tmp_path, *ONE_WORKER, f"ckpt_path={tmp_path}"))
    assert_same_result(tmp_path, finished_run)


@pytest.mark.slow  # test_run_folder.py asks for the id alone.
@pytest.mark.fault("interrupted run that logs to wandb")
def test_a_continued_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    """Offline: what `wandb sync` uploads carries the id, and the server joins the parts."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = ("logger=wandb", "callbacks.pictures=null", "trainer.max_steps=4")

    def train(name, *overrides):
        run(small_config(tmp_path / name, *options, *overrides))
        wandb.finish()
        written = {path.name.rpartition("-")[2] for path in (tmp_path / name / "wandb").glob("offline-run-*")}
        stored = json.loads((tmp_path / name / "run_info.json").read_text())["wandb_id"]
        assert written == {stored}
        return stored

    first = train("first")
    assert train("first", f"ckpt_path={tmp_path / 'first'}", "trainer.max_steps=5") == first
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert train("elsewhere", f"ckpt_path={last}", "trainer.max_steps=6") == first
    assert train("another") != first
