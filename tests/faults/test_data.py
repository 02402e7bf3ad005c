"""Data that cannot be read while a run trains: left out and counted, or the end of the run, with nothing lost."""

import shutil

import pytest

from flextok.cli import main
from flextok.config import describe_error
from flextok.data.image_source import SquareImages
from flextok.training.run import run
from tests.data_modules.images import spoil, write_images
from tests.faults.support import steps_on_disk
from tests.training.support import At, assert_same_result, load, run_with, small_config

IMAGES = 30  # 24 to train on: an epoch of three batches of 8.


def on_images(folder, images, *overrides):
    data = ("data=image_folder", f"data.root={images}", "data.image_size=8", "data.batch_size=8", "data.num_workers=1")
    return small_config(folder, *data, "callbacks.pictures=null", *overrides)


@pytest.mark.fault("unreadable image")
def test_an_image_that_becomes_unreadable_is_left_out_said_and_counted(tmp_path, caplog):
    paths = write_images(tmp_path / "images", IMAGES)
    for path in paths[:5]:
        spoil(path, "truncated")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tolerant = "data.max_bad_fraction=0.2"
    run(on_images(whole, tmp_path / "images", tolerant, "data.num_workers=0"))
    assert "skipping an unreadable image" in caplog.text
    run(on_images(stopped, tmp_path / "images", tolerant, "data.num_workers=0", "trainer.max_steps=5"))
    run(on_images(stopped, tmp_path / "images", tolerant, "data.num_workers=0", f"ckpt_path={stopped}"))
    assert_same_result(stopped, whole)


@pytest.mark.fault("error in a data worker")
def test_too_many_unreadable_images_stop_the_run_after_its_last_completed_step(tmp_path):
    paths = write_images(tmp_path / "images", IMAGES)
    contents = [path.read_bytes() for path in paths]
    strict = ("data.max_bad_fraction=0.1", "trainer.val_check_interval=8")

    def spoil_all():
        for path in paths:
            spoil(path, "truncated")

    with pytest.raises(ValueError, match="Caught ValueError in DataLoader worker process 0") as stopped:
        run_with(on_images(tmp_path / "run", tmp_path / "images", *strict), At(2, "before", spoil_all))
    line = describe_error(stopped.value)
    assert line.startswith("ValueError: 4 of the 30 images in data.root=")
    assert "more than data.max_bad_fraction=0.1 allows" in line
    saved = steps_on_disk(tmp_path / "run")["last.ckpt"]
    assert saved >= 3
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    run(on_images(tmp_path / "run", tmp_path / "images", *strict, f"ckpt_path={tmp_path / 'run'}"))
    run(on_images(tmp_path / "whole", tmp_path / "images", *strict))
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_a_worker_that_fails_for_another_reason_says_which(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", IMAGES)[0].parents[1]

    def fail(dataset, index):
        raise KeyError("no such image")

    monkeypatch.setattr(SquareImages, "__getitem__", fail)
    with pytest.raises(KeyError, match="no such image"):
        run(on_images(tmp_path / "run", images, "trainer.num_sanity_val_steps=0"))


@pytest.mark.fault("damaged latent shard")
def test_a_damaged_shard_ends_the_run_and_the_command_that_is_named_mends_it(tmp_path):
    latents = tmp_path / "latents"
    command = ["latents", str(latents), "vae=pixel", "data=digits", "--shard-size", "300", "--dtype", "fp32"]
    assert main(command) == 0
    shard = latents / "train-000002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(content))
    cfg = small_config(tmp_path / "run", "data=latents", f"data.root={latents}", "callbacks.pictures=null")
    with pytest.raises(
        ValueError, match=r"train-000002\.safetensors is damaged: .* run `flextok latents` again"
    ) as why:
        run(cfg)
    assert "Traceback" not in describe_error(why.value)
    assert main(command) == 0
    assert shard.read_bytes() == content
    shutil.rmtree(tmp_path / "run")
    run(cfg)
    assert load(tmp_path / "run")["global_step"] == 8
