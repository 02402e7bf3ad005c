import csv

import pytest

from flextok.training.loggers import CsvLogger, wandb_logger


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def write(folder, *steps, name="loss"):
    logger = CsvLogger(folder=str(folder))
    for step in steps:
        logger.log_metrics({name: 0.5}, step=step)
    logger.finalize("success")


def test_what_is_logged_at_one_step_becomes_one_row(tmp_path):
    logger = CsvLogger(folder=str(tmp_path))
    logger.log_metrics({"train": 1.0}, step=0)
    logger.save()
    logger.log_metrics({"val": 2.0}, step=0)
    logger.finalize("success")
    assert rows(tmp_path) == [{"step": "1", "train": "1.0", "val": "2.0"}]


def test_a_new_metric_adds_a_column_to_old_rows(tmp_path):
    write(tmp_path, 0, 1)
    write(tmp_path, 2, name="new")
    assert [row["new"] for row in rows(tmp_path)] == ["", "", "0.5"]


def test_going_on_in_a_folder_appends_and_replaces_what_lay_ahead(tmp_path):
    write(tmp_path, 0, 1, 2, 3)
    write(tmp_path, 2, 3, 4)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("half_row", ["3", "3,0", "\n", ","])
def test_a_row_cut_short_by_a_kill_does_no_harm(tmp_path, half_row):
    write(tmp_path, 0, 1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(half_row)
    write(tmp_path, 2)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_a_row_is_in_the_file_as_soon_as_it_is_known(tmp_path):
    logger = CsvLogger(folder=str(tmp_path))
    logger.log_metrics({"train": 1.5}, step=0)
    assert rows(tmp_path) == [{"step": "1", "train": "1.5"}]
    logger.log_metrics({"train": 2.5, "val": 3.5}, step=1)
    logger.log_metrics({"val": 4.0}, step=1)
    assert rows(tmp_path)[1] == {"step": "2", "train": "2.5", "val": "4.0"}


def test_nothing_is_written_without_numbers(tmp_path):
    write(tmp_path)
    assert not (tmp_path / "metrics.csv").exists()


def test_wandb_is_offline_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_logger(project="test", folder=str(tmp_path), ckpt_path=None)._offline
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert not wandb_logger(project="test", folder=str(tmp_path), ckpt_path=None)._offline
