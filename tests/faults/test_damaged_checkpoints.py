"""Checkpoints that are cut short, damaged, foreign or hostile: nothing of them gets into a model."""

import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from flextok.cli import main
from flextok.training.checkpoint_files import DurableCheckpointIO
from flextok.training.checkpoints import checkpoint_of_run, load_run, read_checkpoint
from flextok.training.run import run
from tests.end_to_end.support import evaluate
from tests.faults.support import FOLDER, copy_of, cut, flip
from tests.training.support import assert_same_result, largest_difference, load, small_config


@pytest.fixture
def damaged(finished_run, tmp_path):
    """A run of 8 steps whose newest checkpoint is cut in the middle; the one before is of step 6."""
    folder = copy_of(finished_run, tmp_path / "run")
    last = folder / FOLDER / "last.ckpt"
    cut(last, last.stat().st_size // 2)
    return folder


def is_said(text, newest="last.ckpt"):
    return f"{newest} cannot be read" in text and "taking previous.ckpt, written after step 6" in text


@pytest.mark.fault("truncated checkpoint")
def test_a_run_goes_on_from_the_checkpoint_before_a_truncated_one(damaged, finished_run, caplog):
    run(small_config(damaged, f"ckpt_path={damaged}"))
    assert is_said(caplog.text)
    assert_same_result(damaged, finished_run)


def test_a_truncated_checkpoint_is_passed_over_by_whoever_reads_the_run(damaged, finished_run, tmp_path, caplog):
    metrics = evaluate(damaged, tmp_path / "evaluation")
    assert metrics["protocol"]["weights_file"] == "previous.ckpt"
    assert is_said(caplog.text)
    caplog.clear()
    assert main(["export", str(damaged), str(tmp_path / "export")]) == 0
    assert is_said(caplog.text)
    assert main(["export", str(damaged / FOLDER / "previous.ckpt"), str(tmp_path / "same")]) == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("export", "same")]
    assert largest_difference(*weights) == 0.0


def test_a_file_that_was_named_is_not_replaced_by_another(damaged):
    message = (
        r"last\.ckpt cannot be read, .* others here: previous\.ckpt, best\.ckpt; given its run folder, .*/run, the"
    )
    with pytest.raises(ValueError, match=message):
        run(small_config(damaged, f"ckpt_path={damaged / FOLDER / 'last.ckpt'}"))


@pytest.mark.parametrize("part", [0, 0.3, 0.9, 0.999])
def test_every_truncation_is_found(small_checkpoint, part):
    cut(small_checkpoint, int(part * small_checkpoint.stat().st_size))
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(small_checkpoint)


@pytest.fixture
def small_checkpoint(tmp_path):
    content = {"global_step": 3, "state_dict": {"a": torch.arange(40.0), "b": torch.ones(3)}, "text": ["x", None]}
    DurableCheckpointIO().save_checkpoint(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.fault("flipped bits in a checkpoint")
def test_every_flipped_byte_is_found_or_changes_nothing(small_checkpoint):
    content, whole = small_checkpoint.read_bytes(), read_checkpoint(small_checkpoint)
    whole = {**whole, "state_dict": {name: tensor.clone() for name, tensor in whole["state_dict"].items()}}
    found = 0
    for position in range(len(content)):
        flip(small_checkpoint, position)
        try:
            read = read_checkpoint(small_checkpoint)
        except ValueError:
            found += 1
        else:  # Padding, and dates of files: nothing that is read.
            assert largest_difference(read, whole) == 0.0, position
        small_checkpoint.write_bytes(content)
    with zipfile.ZipFile(small_checkpoint) as archive:
        assert found > sum(entry.file_size for entry in archive.infolist())


@pytest.mark.fault("all checkpoints damaged")
def test_what_is_wrong_with_each_is_said_if_none_is_whole(finished_run, tmp_path):
    folder = copy_of(finished_run, tmp_path)
    for name, num_bytes in (("last.ckpt", 0), ("previous.ckpt", 100), ("best.ckpt", 20_000)):
        cut(folder / FOLDER / name, num_bytes)
    message = "none of its checkpoints can be used: .*last.ckpt cannot.*; .*previous.ckpt cannot.*; .*best.ckpt cannot"
    for read in (load_run, lambda path: run(small_config(tmp_path / "resumed", f"ckpt_path={path}"))):
        with pytest.raises(ValueError, match=message):
            read(folder)
    assert not (tmp_path / "resumed").exists()


def test_copies_that_lost_their_times_still_mean_the_newest(finished_run, tmp_path):
    folder = copy_of(finished_run, tmp_path)
    for times in ((0, 0, 0), (0, 1, 2), (2, 1, 0)):
        for name, time in zip(("last.ckpt", "previous.ckpt", "best.ckpt"), times, strict=True):
            os.utime(folder / FOLDER / name, (time, time))
        assert checkpoint_of_run(folder).name == "last.ckpt"


@pytest.mark.fault("checkpoint of another model")
def test_another_model_is_refused_before_anything_is_written(finished_run, tmp_path):
    with pytest.raises(ValueError, match=r"ckpt_path=.* holds another model: .*; valid: the overrides of the run"):
        run(small_config(tmp_path / "other", f"ckpt_path={finished_run}", "size.registers=8"))
    assert not (tmp_path / "other").exists()


class Hostile:
    """What a pickle may be told to do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.fault("hostile checkpoint")
def test_a_checkpoint_that_brings_code_is_refused_and_does_not_run_it(finished_run, tmp_path):
    harmed = tmp_path / "harmed"
    folder = copy_of(finished_run, tmp_path / "run")
    for file in (folder / FOLDER).iterdir():
        torch.save({**load(finished_run), "state_dict": Hostile(str(harmed))}, file)
    with pytest.raises(ValueError, match="none of its checkpoints can be used"):
        run(small_config(tmp_path / "resumed", f"ckpt_path={folder}"))
    assert not harmed.exists()
    with pytest.raises(FileNotFoundError):
        shutil.rmtree(harmed)
    pickle.loads(pickle.dumps(Hostile(str(harmed))))  # It would have.
    assert harmed.exists()
