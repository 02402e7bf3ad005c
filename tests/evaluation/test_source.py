"""What `checkpoint=` may name, and what it says about everything else."""

import json
import os

import pytest
import torch

from flextok.evaluation.run import check_image_size, data_config
from flextok.evaluation.source import find_source

DIGITS = "flextok.data.digits.DigitsDataModule"
CONFIG = {
    "model": {},
    "data": {"_target_": DIGITS, "image_size": 16},
    "latent": {"downsample": 2},
    "size": {"patch": 2},
}


@pytest.fixture
def runs(tmp_path):
    """Two runs, the older one of them by name being the newer one by its checkpoint."""
    for age, name in enumerate(("digits/2026-01-02", "photos/2026-01-01")):
        checkpoint = tmp_path / "runs" / name / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        torch.save({}, checkpoint)
        os.utime(checkpoint, (1e9 - age, 1e9 - age))
        (checkpoint.parents[1] / "config.yaml").write_text(json.dumps(CONFIG))
    return tmp_path / "runs"


def test_a_run_folder(runs):
    source = find_source(str(runs / "digits/2026-01-02"), runs=runs)
    assert source.kind == "run"
    assert source.default_output_dir == runs / "digits/2026-01-02/evaluation"
    assert source.weights_file == runs / "digits/2026-01-02/checkpoints/last.ckpt"
    assert source.run_data() == CONFIG["data"]


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


def test_a_checkpoint_alone_brings_its_config(tmp_path):
    torch.save({"hyper_parameters": CONFIG}, tmp_path / "last.ckpt")
    source = find_source(str(tmp_path / "last.ckpt"), runs=tmp_path)
    assert (source.kind, source.run_folder) == ("checkpoint", None)
    assert source.run_data() == CONFIG["data"]
    assert source.default_output_dir == tmp_path / "last_evaluation"


@pytest.mark.parametrize("content", [{}, {"hyper_parameters": [1]}, {"hyper_parameters": {"data": {}}}])
def test_a_checkpoint_without_the_config_of_a_run_is_named(tmp_path, content):
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt has no config of a run"):
        find_source(str(tmp_path / "last.ckpt"), runs=tmp_path).run_data()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"_target_": "shutil.copy", "src": "a", "dst": "b"}, "data._target_: 'shutil.copy' is refused"),
        ({"_target_": DIGITS, "x": {"_target_": "os.system"}}, r"data\.x\._target_: 'os.system' is refused"),
        ({"_target_": DIGITS, "root": "${oc.env:HOME}"}, r"data\.root: .*interpolations"),
        (None, "data: there is no data module"),
    ],
    ids=str,
)
def test_a_run_names_only_our_own_data(tmp_path, data, complaint):
    torch.save({"hyper_parameters": CONFIG | {"data": data}}, tmp_path / "last.ckpt")
    source = find_source(str(tmp_path / "last.ckpt"), runs=tmp_path)
    with pytest.raises(ValueError, match=rf"last\.ckpt: config, {complaint}.*data=<group>"):
        data_config(None, source, batch_size=1)
    own = {"_target_": "my.Data"}
    assert data_config(own, source, batch_size=1) == own | {"eval_batch_size": 1}


@pytest.mark.parametrize(("size", "fits"), [(4, True), (8, True), (16, True), (6, False), (20, False), (0, False)])
def test_images_are_no_larger_than_those_of_the_run(runs, size, fits):
    source = find_source(str(runs / "digits/2026-01-02"), runs=runs)
    if fits:
        check_image_size({"image_size": size}, source)
    else:
        message = rf"data.image_size={size} cannot be used; valid: 16 \(.*\) or smaller multiples of 4"
        with pytest.raises(ValueError, match=message):
            check_image_size({"image_size": size}, source)


@pytest.mark.parametrize("name", ["missing", "empty", "notes.txt"])
def test_anything_else_is_refused_with_what_is_valid(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=f"checkpoint=.*{name}"):
        find_source(str(tmp_path / name), runs=tmp_path)


def test_latest_without_runs_says_where_it_looked(tmp_path):
    with pytest.raises(ValueError, match=f"below {tmp_path / 'runs'}"):
        find_source("latest", runs=tmp_path / "runs")
