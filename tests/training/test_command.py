"""`train.py` as people run it: what a mistake looks like, and what a killed run leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support import REPOSITORY
from tests.training.support import SMALL, largest_difference, load


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, "train.py", *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options
    )


def last_line(*arguments, folder):
    process = start(*arguments, f"paths.runs={folder}")
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainer.max_stepz=3"], ["max_stepz", "did you mean 'max_steps'?"]),
        (["logger=null"], ["to leave a group out", "logger=none"]),
        (["trainer.accelerator=tpu"], ["trainer.accelerator='tpu'", "trainer=cpu"]),
        (["model=tinny"], ["model/tinny", "Available options", "tiny"]),
        (["validation.keep_ks=[0]"], ["error: validation.keep_ks=[0]", "integers from 1 to"]),
    ],
)
def test_a_mistake_ends_in_one_readable_line(arguments, expected, tmp_path):
    code, line = last_line(*arguments, folder=tmp_path)
    assert code == 2
    assert line.startswith("error: ")
    assert all(part in line for part in expected), line


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:] + errors[-2000:]


@pytest.mark.slow
@pytest.mark.fault("kill -9")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_exactly(tmp_path, kind):
    # Also as a process of its own: another number of threads would round differently.
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(*SMALL, f"hydra.run.dir={undisturbed}"))
    process = start(*SMALL, f"hydra.run.dir={killed}")
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(kind)
    process.communicate(timeout=60)
    assert load(killed)["global_step"] >= 3
    finish(start(*SMALL, f"hydra.run.dir={killed}", f"ckpt_path={killed}"))
    for part in ("state_dict", "ema"):
        assert largest_difference(load(killed)[part], load(undisturbed)[part]) == 0.0


@pytest.mark.slow
def test_two_processes_write_one_folder_and_resume_exactly(tmp_path):
    two = (*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    two = (*two, "callbacks.pictures=null", "data.batch_size=200")
    finish(start(*two, f"hydra.run.dir={tmp_path / 'full'}"))
    finish(start(*two, f"hydra.run.dir={tmp_path / 'short'}", "trainer.max_steps=5"))
    finish(start(*two, f"hydra.run.dir={tmp_path / 'rest'}", f"ckpt_path={tmp_path / 'short'}"))
    assert len(list((tmp_path / "full" / "checkpoints").iterdir())) == 3
    for part in ("state_dict", "ema"):
        assert largest_difference(load(tmp_path / "rest")[part], load(tmp_path / "full")[part]) == 0.0
