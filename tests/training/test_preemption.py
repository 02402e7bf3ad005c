"""A run that a signal stops saves its last step, says so in its exit code, and goes on with the same command."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from flextok.config import check_config
from flextok.training.distributed import check_one_start
from flextok.training.preemption import EXIT_CODE, SIGNALS
from flextok.training.resume import checkpoint_to_resume
from flextok.training.run import run
from tests.training.support import assert_same_result, largest_difference, load, rows, small_config

HERE = "tests.training.test_preemption"


class SignalAt(Callback):
    """The process of one rank gets a signal, once: a run that goes on is not meant."""

    def __init__(self, *, place, step, signum=signal.SIGUSR1, rank=0):
        self.place, self.step, self.signum, self.rank = place, step, signum, rank

    def _send(self, trainer, place):
        if (place, self.step, self.rank) == (self.place, trainer.global_step, trainer.global_rank):
            self.place = None
            os.kill(os.getpid(), self.signum)

    def on_sanity_check_start(self, trainer, pl_module):
        self._send(trainer, "sanity check")

    def on_before_backward(self, trainer, pl_module, loss):
        self._send(trainer, "within the step")

    def on_validation_start(self, trainer, pl_module):
        self._send(trainer, "in validation")


def signal_at(place, step, **options):
    settings = {"_target_": f"{HERE}.SignalAt", "place": place, "step": step, **options}
    return f"+callbacks.signal={{{', '.join(f'{name}: {value}' for name, value in settings.items())}}}"


def stopped(folder, *overrides):
    """The exit code of a run that a signal ends; afterwards the signals are handled as before."""
    former = [signal.getsignal(signum) for signum in SIGNALS]
    with pytest.raises(SystemExit) as error:
        run(small_config(folder, "ckpt_path=auto", *overrides))
    assert [signal.getsignal(signum) for signum in SIGNALS] == former
    return error.value.code


@pytest.mark.parametrize(
    "signum",
    [SIGNALS[0], *(pytest.param(signum, marks=pytest.mark.slow) for signum in SIGNALS[1:])],
    ids=lambda signum: signum.name,
)
def test_a_signalled_run_completes_its_step_and_goes_on_exactly(finished_run, tmp_path, caplog, signum):
    caplog.set_level("INFO")
    assert stopped(tmp_path, signal_at("within the step", 4, signum=int(signum))) == EXIT_CODE == 75
    assert load(tmp_path)["global_step"] == 5  # The step that was running is not lost.
    assert f"stopped by {signum.name} after step 5; to go on: the same command with hydra.run.dir=" in caplog.text
    run(small_config(tmp_path, "ckpt_path=auto"))
    assert "last.ckpt at step 5" in caplog.text
    assert_same_result(tmp_path, finished_run)
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, 9)]


def test_a_signal_ends_a_validation_at_once(finished_run, tmp_path):
    several = ("trainer.limit_val_batches=null", "callbacks.best=null", "callbacks.pictures=null")
    assert stopped(tmp_path, signal_at("in validation", 4), *several) == EXIT_CODE
    assert load(tmp_path)["global_step"] == 4
    assert all(row.get("val/flow_loss", "") == "" for row in rows(tmp_path))
    run(small_config(tmp_path, "ckpt_path=auto", *several))
    for part in ("state_dict", "ema", "optimizer_states"):
        assert largest_difference(load(tmp_path)[part], load(finished_run)[part]) == 0.0


def test_a_signal_within_accumulated_batches_leaves_out_the_unfinished_step(tmp_path):
    accumulate = ("trainer.accumulate_grad_batches=2", "trainer.max_steps=5", "callbacks.pictures=null")
    run(small_config(tmp_path / "full", *accumulate))
    # Of the three batches of an epoch the last is a step by itself.
    assert stopped(tmp_path / "part", signal_at("within the step", 2), *accumulate) == EXIT_CODE
    assert load(tmp_path / "part")["global_step"] == 2
    run(small_config(tmp_path / "part", "ckpt_path=auto", *accumulate))
    assert_same_result(tmp_path / "part", tmp_path / "full")


def test_before_the_first_step_a_signal_ends_the_run_and_nothing_is_saved(tmp_path):
    assert stopped(tmp_path, signal_at("sanity check", 0)) == EXIT_CODE
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_whoever_handled_the_signal_before_is_called_once_all_is_saved(tmp_path):
    """As submitit, which puts its job back into the queue there and ends the process."""
    seen = []

    def requeue(signum, frame):
        seen.append((signum, load(tmp_path)["global_step"]))
        raise SystemExit(144)

    former = signal.signal(signal.SIGUSR2, requeue)
    try:
        assert stopped(tmp_path, signal_at("within the step", 4, signum=int(signal.SIGUSR2))) == 144
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert seen == [(signal.SIGUSR2, 5)]


# --- ckpt_path=auto ---------------------------------------------------------------------------------------------------


def test_auto_finds_the_newest_checkpoint_of_its_own_folder_or_none(tmp_path):
    assert checkpoint_to_resume("auto", tmp_path) is None
    for age, name in enumerate(["last.ckpt", "step_00000004.ckpt", "best.ckpt"]):
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        torch.save({"global_step": 4}, path)
        os.utime(path, (100 - age, 100 - age))
    assert checkpoint_to_resume("auto", tmp_path)[0].name == "last.ckpt"


def test_a_new_run_over_an_old_one_is_said(tmp_path, caplog):
    assert checkpoint_to_resume(None, tmp_path) is None
    assert caplog.text == ""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert checkpoint_to_resume(None, tmp_path) is None
    assert "a new run replaces the one in" in caplog.text


def test_auto_takes_no_run_with_other_settings_for_its_own(tmp_path, caplog):
    run(small_config(tmp_path, "trainer.max_steps=2", "callbacks.pictures=null"))
    with pytest.raises(ValueError, match=r"auto finds a run with other .*: data.seed was 0, is now 1; valid: "):
        run(small_config(tmp_path, "ckpt_path=auto", "seed=1"))
    run(small_config(tmp_path, "ckpt_path=auto", "trainer.max_steps=4"))
    assert load(tmp_path)["global_step"] == 4
    assert "trainer.max_steps was 2, is now 4" in caplog.text


def test_auto_needs_no_file_and_may_begin_with_other_weights(tmp_path):
    check_config(small_config(tmp_path, "ckpt_path=auto"))
    with pytest.raises(ValueError, match="valid: null, auto, or an existing path"):
        check_config(small_config(tmp_path, "ckpt_path=aut"))


def test_ranks_that_find_different_checkpoints_are_refused(monkeypatch):
    check_one_start(Path("a"))
    found = [Path("runs/a/last.ckpt"), None]
    monkeypatch.setattr("flextok.training.distributed.of_all_ranks", lambda value: found)
    with pytest.raises(ValueError, match=r"rank 0: runs/a/last.ckpt, rank 1: None\); valid: a file system that"):
        check_one_start(None)


def test_workers_of_loaders_outlive_the_signals_of_their_job(tmp_path):
    """A cluster signals all processes of a job, and a loader whose worker died would end training unsaved."""
    from flextok.data.loaders import outlive_signals
    from flextok.training.run import build

    former = [signal.getsignal(signum) for signum in SIGNALS]
    try:
        outlive_signals(0)
        assert {signal.getsignal(signum) for signum in SIGNALS} == {signal.SIG_IGN}
    finally:
        for signum, handler in zip(SIGNALS, former, strict=True):
            signal.signal(signum, handler)
    data = build(small_config(tmp_path)).data
    data.setup("fit")
    data.trainer = SimpleNamespace(current_epoch=0)
    assert data.val_dataloader().worker_init_fn is outlive_signals
