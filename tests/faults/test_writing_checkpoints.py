"""A checkpoint is written whole or not at all, whatever stops the writing; those that were there stay."""

import io
import itertools
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from flextok.config import run_command
from flextok.training.checkpoint_files import (
    CheckpointNotWritten,
    DurableCheckpointIO,
    put_in_place,
    refusals_explained,
)
from flextok.training.checkpoints import read_newest
from flextok.training.run import run
from tests.faults.support import (
    FOLDER,
    cut,
    die,
    in_a_fork,
    in_a_process,
    run_and_die,
    run_and_fill_the_disk,
    steps_on_disk,
)
from tests.training.support import At, assert_same_result, run_with, small_config


def write(folder, step):
    content = {"global_step": step, "state_dict": {"a": torch.full((50,), float(step))}}
    DurableCheckpointIO().save_checkpoint(content, folder / FOLDER / "last.ckpt")


# --- killed -----------------------------------------------------------------------------------------------------------


def write_and_die(folder, step, at):
    """Write a checkpoint, and die instead of the `at`-th call that changes something on the disk."""
    count = itertools.count()

    def deadly(function):
        def call(*args, **kwargs):
            if next(count) == at:
                die()
            return function(*args, **kwargs)

        return call

    class DeadlyFile(io.FileIO):
        write = deadly(io.FileIO.write)

    Path.open = lambda path, mode: DeadlyFile(path, mode)
    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
        setattr(owner, name, deadly(getattr(owner, name)))
    write(folder, step)


@pytest.mark.fault("kill -9 while a checkpoint is written")
@pytest.mark.parametrize("last_is_damaged", [False, True])
def test_there_is_a_whole_checkpoint_whenever_writing_is_killed(tmp_path, last_is_damaged):
    moments = 0
    for at in itertools.count():
        folder = tmp_path / str(at)
        for step in (1, 2):
            write(folder, step)
        if last_is_damaged:
            cut(folder / FOLDER / "last.ckpt", 300)
        code = in_a_fork(write_and_die, folder, 3, at)
        step = read_newest(folder)[1]["global_step"]
        assert step in ((1, 3) if last_is_damaged else (2, 3))
        write(folder, 4)
        assert read_newest(folder)[1]["global_step"] == 4
        assert {path.name for path in (folder / FOLDER).iterdir()} <= {"last.ckpt", "previous.ckpt"}
        if code == 0:
            break
        assert code == -signal.SIGKILL
        moments += 1
    assert step == 3
    assert moments > 8


def die_while_writing(folder):
    """A run whose second `last.ckpt`, of step 6, has not got its name yet."""

    def act():
        Path.rename = lambda *_: die()

    run_with(small_config(folder), At(4, "after", act))


def test_a_run_killed_while_it_wrote_goes_on_exactly(finished_run, tmp_path):
    assert in_a_process(die_while_writing, tmp_path) == -signal.SIGKILL
    assert ".last.ckpt.tmp" in {path.name for path in (tmp_path / FOLDER).iterdir()}
    run(small_config(tmp_path, f"ckpt_path={tmp_path}"))
    assert_same_result(tmp_path, finished_run)
    assert steps_on_disk(tmp_path).keys() == {"last.ckpt", "previous.ckpt", "best.ckpt"}


@pytest.mark.fault("kill -9")
@pytest.mark.parametrize(
    ("step", "place"),
    [
        (5, "in the update"),
        *(pytest.param(*at, marks=pytest.mark.slow) for at in ((4, "in validation"), (7, "within"))),
    ],
)
def test_a_run_that_was_killed_goes_on_exactly(finished_run, tmp_path, step, place):
    assert in_a_process(run_and_die, tmp_path, step, place) == -signal.SIGKILL
    assert steps_on_disk(tmp_path)["last.ckpt"] == step // 3 * 3
    run(small_config(tmp_path, f"ckpt_path={tmp_path}"))
    assert_same_result(tmp_path, finished_run)


# --- refused by the system --------------------------------------------------------------------------------------------


@pytest.mark.fault("full disk: checkpoint")
@pytest.mark.parametrize("name", ["last.ckpt", pytest.param("best.ckpt", marks=pytest.mark.slow)])
def test_a_run_stops_where_a_checkpoint_does_not_fit_and_goes_on_when_it_does(finished_run, tmp_path, name, caplog):
    cfg = small_config(tmp_path, "callbacks.pictures=null")
    if name == "last.ckpt":
        cfg.callbacks.best = None
    message = rf"{name} cannot be written: File too large\. It takes \d+\.\d MB, \d+\.\d .B are free in {tmp_path}"
    with pytest.raises(CheckpointNotWritten, match=message) as stopped:
        run_and_fill_the_disk(cfg, 5 if name == "last.ckpt" else 3, "within", 20_000)
    assert "hydra.run.dir=<folder>; then continue with ckpt_path=" in str(stopped.value)
    assert "the last completed step is lost" in caplog.text
    assert steps_on_disk(tmp_path) == {"last.ckpt": 3}  # No half file either.
    cfg.ckpt_path = str(tmp_path)
    run(cfg)
    assert_same_result(tmp_path, finished_run)


def test_a_really_full_device_is_named(tmp_path):
    write(tmp_path, 1)
    (tmp_path / FOLDER / ".last.ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointNotWritten, match=r"last\.ckpt cannot be written: No space left on device"):
        write(tmp_path, 2)
    assert steps_on_disk(tmp_path) == {"last.ckpt": 1}


def test_a_checkpoint_that_cannot_be_written_ends_in_one_line_and_a_code(tmp_path, capsys):
    (tmp_path / FOLDER).write_text("a file in its way")
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: write(tmp_path, 1))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: .*last\.ckpt cannot be written: (Not a directory|File exists)", line)


def test_what_is_no_fault_of_the_disk_is_raised_as_it_is(tmp_path):
    with pytest.raises(AttributeError):
        DurableCheckpointIO().save_checkpoint({"state_dict": lambda: None}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_takes_its_place_as_a_file_does(tmp_path):
    for step in range(4):
        written = tmp_path / "written"
        written.mkdir()
        (written / "step").write_text(str(step))
        put_in_place(written, tmp_path / "last.ckpt")
    found = {path.name: (path / "step").read_text() for path in tmp_path.iterdir()}
    assert found == {"last.ckpt": "3", "previous.ckpt": "2"}


def fail():
    raise RuntimeError("of another kind")


def test_what_interrupted_a_run_is_not_taken_for_a_refusal_to_save_it(tmp_path):
    try:
        raise ConnectionResetError("a worker is gone")
    except ConnectionResetError:
        with pytest.raises(RuntimeError, match="of another kind"), refusals_explained(tmp_path / "last.ckpt", {}):
            fail()
