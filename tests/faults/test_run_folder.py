"""The other files of a run: a folder that takes none, and files that were damaged or find no place."""

import re

import pytest

from flextok.cli import main
from flextok.config import describe_error
from flextok.data.datamodule import ImageDataModule
from flextok.training.checkpoints import load_run
from flextok.training.loggers import CsvLogger, wandb_logger
from flextok.training.run import run
from tests.end_to_end.support import evaluate
from tests.faults.support import FOLDER, copy_of, cut, files_end_at
from tests.support import python
from tests.training.support import assert_same_result, rows, small_config


@pytest.mark.fault("run folder that cannot be written to")
@pytest.mark.parametrize("place", ["the folder", "its checkpoints"])
def test_a_folder_that_takes_no_file_is_named_before_data_is_read(finished_run, tmp_path, monkeypatch, place):
    def read(self, stage=None):
        raise AssertionError("data was read")

    monkeypatch.setattr(ImageDataModule, "setup", read)
    folder = tmp_path / "file" / "run" if place == "the folder" else tmp_path
    # Not by its rights, which do not bind root.
    (tmp_path / "file" if place == "the folder" else tmp_path / FOLDER).write_text("in the way")
    with pytest.raises(ValueError, match=r"^paths.run='.*' cannot be written to \(Not a directory: .*hydra.run.dir="):
        run(small_config(folder))


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = python("train.py", "experiment=digits", f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert done.returncode == 2
    expected = rf"error: \[Errno 20\] Not a directory: '{tmp_path}/file/run' \| where a run is written: hydra.run.dir="
    assert re.match(expected, done.stderr.splitlines()[-1])


@pytest.mark.fault("damaged config.yaml")
@pytest.mark.parametrize("damage", ["empty", "cut", "no text"])
def test_a_damaged_config_is_replaced_by_the_copy_in_the_checkpoint(finished_run, tmp_path, caplog, damage):
    folder = copy_of(finished_run, tmp_path / "run")
    file = folder / "config.yaml"
    content = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "cut": content[: content.index(b"model:") + 8], "no text": b"\xff\x00" * 99}[damage]
    )
    model, cfg = load_run(folder)
    assert cfg.size.registers == model.num_registers == 4
    assert "config.yaml is damaged" in caplog.text
    assert "taking the copy in the checkpoint" in caplog.text
    if damage == "cut":
        assert evaluate(folder, tmp_path / "evaluation")["protocol"]["num_images"] == 4
        assert main(["describe", str(folder)]) == 0
        run(small_config(folder, f"ckpt_path={folder}"))
        assert len(file.read_bytes()) > len(content) / 2


@pytest.mark.fault("damaged metrics.csv")
def test_a_row_that_was_cut_is_left_out_and_said(finished_run, tmp_path, caplog):
    run(small_config(tmp_path, "trainer.max_steps=6"))
    file = tmp_path / "metrics.csv"
    cut(file, len(file.read_bytes()) - 3)
    run(small_config(tmp_path, f"ckpt_path={tmp_path}"))
    assert "metrics.csv: 1 rows were cut short and are left out" in caplog.text
    assert_same_result(tmp_path, finished_run)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4", "5", "7", "8"]


@pytest.mark.parametrize("content", [b"\x00" * 500, b"\xff\xfe\x01", b"a,b\r\n1,2\r\n"])
def test_a_file_that_is_no_table_is_put_aside(tmp_path, caplog, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    log(tmp_path, 3)
    assert "metrics.csv is damaged" in caplog.text
    assert (tmp_path / "metrics.damaged.csv").read_bytes() == content
    assert [row["step"] for row in rows(tmp_path)] == ["4"]


def log(folder, *steps):
    logger = CsvLogger(folder=str(folder))
    for step in steps:
        logger.log_metrics({"loss": 0.5}, step=step)
    logger.finalize("success")


@pytest.mark.fault("full disk: numbers and pictures")
def test_rows_wait_until_the_disk_takes_them(tmp_path, caplog):
    logger = CsvLogger(folder=str(tmp_path))
    for step in (0, 1):
        logger.log_metrics({"loss": 0.25}, step=step)
    with files_end_at((tmp_path / "metrics.csv").stat().st_size + 3):
        for step in (2, 3):
            logger.log_metrics({"loss": 0.25}, step=step)
        logger.log_metrics({"other": 1.0}, step=3)
        assert "metrics.csv cannot be written, rows wait in memory" in caplog.text
    logger.log_metrics({"loss": 0.25}, step=4)
    assert "can be written again, 3 rows had waited" in caplog.text
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(str(step), "0.25") for step in range(1, 6)]
    assert rows(tmp_path)[3]["other"] == "1.0"
    assert len(caplog.records) == 2


def test_rows_that_were_never_taken_are_said_at_the_end(tmp_path, caplog):
    logger = CsvLogger(folder=str(tmp_path / "missing"))
    (tmp_path / "missing").write_text("a file in its way")
    logger.log_metrics({"loss": 0.25}, step=0)
    logger.finalize("failed")
    assert "metrics.csv lacks its last 1 rows" in caplog.text


def test_a_picture_that_cannot_be_written_does_not_end_the_run(finished_run, tmp_path, caplog):
    (tmp_path / "pictures").write_text("a file in its way")
    run(small_config(tmp_path))
    assert "pictures/step_000004.png is left out, it cannot be written" in caplog.text
    assert_same_result(tmp_path, finished_run)


def test_the_wandb_run_is_that_of_the_run_that_goes_on(tmp_path, caplog, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "old" / FOLDER).mkdir(parents=True)
    (tmp_path / "old" / "config.yaml").touch()
    (tmp_path / "old" / "run_info.json").write_text('{"wandb_id": "abc"}')
    last = tmp_path / "old" / FOLDER / "last.ckpt"
    last.touch()

    def name(folder, ckpt_path, **options):
        return wandb_logger(folder=str(tmp_path / folder), ckpt_path=ckpt_path, project="test", **options).version

    assert name("old", str(tmp_path / "old")) == name("new", str(last)) == "abc"
    assert name("old", None) != "abc"  # A new run, if in an old folder.
    assert name("new", str(last), id="own") == "own"
    (tmp_path / "old" / "run_info.json").write_text("{")
    assert name("old", str(last)) != "abc"
    assert "run_info.json cannot be read" in caplog.text


def test_an_error_of_the_system_is_one_line():
    error = PermissionError(13, "Permission denied", "/runs")
    assert describe_error(error).startswith("[Errno 13] Permission denied: '/runs' | where a run is written")
    assert describe_error(FileNotFoundError(2, "No such file", "x")) == "[Errno 2] No such file: 'x'"
