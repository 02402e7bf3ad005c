"""What `checkpoint=` may name, and what it says about everything else."""

import os

import pytest

from flextok.evaluation import source as source_module
from flextok.evaluation.source import find_source
from flextok.training import run_folder


@pytest.fixture
def runs(tmp_path):
    """Two runs, the older one of them by name being the newer one by its checkpoint."""
    for age, name in enumerate(("digits/2026-01-02", "photos/2026-01-01")):
        checkpoint = tmp_path / "runs" / name / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_bytes(b"weights")
        os.utime(checkpoint, (1e9 - age, 1e9 - age))
        (checkpoint.parents[1] / "config.yaml").write_text("root: here\ndata: {_target_: x, root: '${root}'}\n")
    return tmp_path / "runs"


def test_a_run_folder(runs):
    source = find_source(str(runs / "digits/2026-01-02"), runs=runs)
    assert source.kind == "run"
    assert source.default_output_dir == runs / "digits/2026-01-02/evaluation"
    assert source.weights_file == runs / "digits/2026-01-02/checkpoints/last.ckpt"
    assert source.run_data() == {"_target_": "x", "root": "here"}


def test_a_checkpoint_belongs_to_the_run_around_it(runs):
    source = find_source(str(runs / "digits/2026-01-02/checkpoints/last.ckpt"), runs=runs)
    assert source.kind == "checkpoint"
    assert source.default_output_dir == runs / "digits/2026-01-02/evaluation"
    assert source.weights_file.name == "last.ckpt"


def test_latest_is_the_run_with_the_newest_checkpoint(runs):
    unfinished = runs / "digits" / "2026-01-03"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("data: null\n")
    assert find_source("latest", runs=runs).path == runs / "digits/2026-01-02"


def test_an_exported_folder_and_a_bare_file_know_no_data(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    folder = find_source(str(tmp_path), runs=tmp_path)
    assert (folder.kind, folder.run_data()) == ("export", None)
    assert folder.default_output_dir == tmp_path / "evaluation"
    assert folder.weights_file == tmp_path / "model.safetensors"
    file = find_source(str(tmp_path / "model.safetensors"), runs=tmp_path)
    assert (file.kind, file.run_data()) == ("file", None)
    assert file.default_output_dir == tmp_path / "model_evaluation"
    with pytest.raises(ValueError, match="weights='raw'.*one set of weights"):
        file.load(weights="raw")


@pytest.mark.parametrize("name", ["missing", "empty", "notes.txt", "alone.ckpt"])
def test_anything_else_is_refused_with_what_is_valid(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "alone.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=f"checkpoint=.*{name}"):
        find_source(str(tmp_path / name), runs=tmp_path)


def test_latest_without_runs_says_where_it_looked(tmp_path):
    with pytest.raises(ValueError, match=f"below {tmp_path / 'runs'}"):
        find_source("latest", runs=tmp_path / "runs")


def test_names_in_a_run_folder_are_those_of_training():
    assert source_module.CONFIG == run_folder.CONFIG
    assert source_module.CHECKPOINTS == run_folder.CHECKPOINTS
