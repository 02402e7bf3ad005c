"""Latents computed in advance: what was encoded comes back, however often writing was interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from flextok.cli import latent_writer, main, shard_folder
from flextok.cli.latents import encode_images
from flextok.config import check_config, compose
from flextok.data.image_source import SquareImages
from flextok.data.latents import LatentsDataModule
from flextok.model.data_dict import RNG_KEY
from flextok.training.run import build, run
from tests.data_modules.images import spoil, write_images
from tests.support import RECORDED, REPOSITORY, Interruptions, Killed
from tests.training.support import SMALL, repeatable, small_config

DIGITS = ("vae=pixel", "data=digits", "latent.channels=1", "latent.mean=-0.39", "latent.std=0.75")
LATENT = {"channels": 1, "downsample": 1, "mean": -0.39, "std": 0.75}


def write(folder, *arguments):
    return main(["--traceback", "latents", str(folder), *map(str, arguments)])


def photos(*changes):
    crops = ("data.train_crops_per_epoch=30", "data.num_eval_crops=6", "data.image_size=8")
    return ("vae=pixel", "data=photos", "data.names=[chelsea]", *crops, *changes)


def opened(folder, **changes):
    settings = {"root": folder, "latent": None, "verify": True, "image_size": 8, "batch_size": 4, "num_workers": 0}
    data = LatentsDataModule(**({"features": True} | settings | changes))
    data.setup("fit")
    return data


def samples(folder, **changes):
    """Everything in a folder: `{(split, variant, key): latents}`; no key may occur twice."""
    found = {}
    for split, dataset in opened(folder, **changes).datasets.items():
        for number in range(len(dataset)):
            for epoch in range(dataset.num_variants):
                sample = dataset[epoch, number]
                place = (split, number, sample["key"], tuple(sample["latents"].flatten().tolist()))
                found[place] = found.get(place, 0) + 1
    return found


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "digits"
    assert write(folder, *DIGITS, "--dtype", "fp32", "--shard-size", "300") == 0
    return folder


# --- what comes back --------------------------------------------------------------------------------------------------


def test_fp32_gives_what_encoding_gives(digits_folder):
    config = compose(DIGITS)
    vae, images = instantiate(config.model.vae), instantiate(config.data)
    images.setup("fit")
    for split, dataset in opened(digits_folder).datasets.items():
        assert len(dataset) == len(images.datasets[split])
        for number in range(0, len(dataset), 37):
            original, stored = images.datasets[split][number], dataset[number]
            direct = vae.encode({"rgb": original["image"][None].split(1)})["vae_latents"][0][0]
            assert stored["key"] == original["key"]
            assert torch.equal(stored["latents"], direct)


def test_the_network_draws_by_seed_key_and_variant(tmp_path):
    write_images(tmp_path / "images", 12)
    overrides = (
        *("data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=16", "data.num_workers=0"),
        *("vae=kl", f"latent.path={RECORDED / 'tiny_vae'}", "latent.channels=4"),
    )
    for dtype in ("fp32", "bf16"):
        write(tmp_path / dtype, *overrides, "--dtype", dtype, "--variants", "2", "--shard-size", "4")
    config = compose(overrides)
    vae, images = instantiate(config.model.vae), instantiate(config.data)
    images.setup("predict")
    dataset = images.datasets["train"]
    for number in range(len(dataset)):
        for epoch in range(2):
            stored = opened(tmp_path / "fp32", image_size=16).datasets["train"][epoch, number]
            rounded = opened(tmp_path / "bf16", image_size=16).datasets["train"][epoch, number]
            assert torch.equal(stored["latents"].bfloat16().float(), rounded["latents"])
            options = []
            for variant in range(2):
                sample = dataset.variant(number, variant)
                direct = encode_images(vae, sample["image"][None], [sample["key"]], [variant], seed=0)[0]
                options.append(float((direct - stored["latents"]).abs().max()))
            assert min(options) < 1e-4 < max(options)


def test_every_epoch_takes_another_variant(tmp_path):
    write(tmp_path, *photos("data.seed=3"), "--dtype", "fp32", "--variants", "3")
    dataset = opened(tmp_path).datasets["train"]
    images = instantiate(compose(photos("data.seed=3")).data)
    images.setup("predict")
    for number in range(len(dataset)):
        keys = [dataset[epoch, number]["key"] for epoch in range(6)]
        assert keys[:3] == keys[3:]
        assert set(keys) == {images.datasets["train"][variant, number]["key"] for variant in range(3)}
    assert len({dataset[0, number]["key"] == images.datasets["train"][0, number]["key"] for number in range(30)}) == 2
    assert opened(tmp_path).datasets["val"].num_variants == 1


def test_variants_of_a_file_are_itself_and_its_mirror_image(tmp_path):
    write_images(tmp_path, 12)
    images = instantiate(compose(["data=image_folder", f"data.root={tmp_path}", "data.image_size=8"]).data)
    images.setup("predict")
    dataset = images.datasets["train"]
    assert isinstance(dataset, SquareImages)
    first = [dataset.variant(number, 0)["image"] for number in range(len(dataset))]
    second = [dataset.variant(number, 1)["image"] for number in range(len(dataset))]
    assert all(torch.equal(a, b.flip(-1)) for a, b in zip(first, second, strict=True))
    plain = [dataset._sample(number)["image"] for number in range(len(dataset))]
    assert {torch.equal(a, b) for a, b in zip(first, plain, strict=True)} == {True, False}


def test_unreadable_images_are_left_out_and_counted(tmp_path, caplog):
    paths = write_images(tmp_path / "images", 20)
    spoil(paths[3], "truncated")
    spoil(paths[11], "empty")
    overrides = ("vae=pixel", "data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=8")
    write(tmp_path / "out", *overrides, "data.num_workers=0", "--variants", "2", "--shard-size", "5")
    index = json.loads((tmp_path / "out/index.json").read_text())
    shards = [shard for split in index["splits"].values() for shard in split["shards"]]
    assert sum(shard["skipped"] for shard in shards) == 2
    stored = {key for _, _, key, _ in samples(tmp_path / "out")}
    assert stored == {path.relative_to(tmp_path / "images").as_posix() for path in paths} - {
        paths[n].relative_to(tmp_path / "images").as_posix() for n in (3, 11)
    }
    assert "could not be read and were left out" in caplog.text
    with pytest.raises(ValueError, match="max_bad_fraction"):
        write(tmp_path / "strict", *overrides, "data.num_workers=0", "data.max_bad_fraction=0")


def test_workers_give_the_same_files(tmp_path):
    for workers in (0, 2):
        write(tmp_path / str(workers), *photos(f"data.num_workers={workers}"), "--shard-size", "8")
    first, second = (json.loads((tmp_path / name / "index.json").read_text()) for name in "02")
    assert first == second


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_interruptions_at_random_points_change_nothing(tmp_path, monkeypatch):
    arguments = (*photos(), "--variants", "2", "--shard-size", "4", "--batch-size", "3")
    write(tmp_path / "whole", *arguments)
    generator, interruptions = random.Random(0), Interruptions(monkeypatch)
    # Points in between: before a batch, before a shard is written, while it is, and before the index is replaced.
    interruptions.may_strike(latent_writer, "shard_tensors", "save_file")
    interruptions.may_strike(shard_folder, "sha256_of", "atomic_path")
    interruptions.may_strike(latent_writer.torch, "stack")
    done = 0
    for _ in range(10):
        interruptions.calls_left = generator.randint(0, 30)
        with pytest.raises(Killed):
            write(tmp_path / "broken", *arguments)
        index = tmp_path / "broken/index.json"
        if index.exists():
            now = sum(len(split["shards"]) for split in json.loads(index.read_text())["splits"].values())
            assert now >= done
            done = now
    monkeypatch.undo()
    write(tmp_path / "broken", *arguments)
    assert samples(tmp_path / "broken") == samples(tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "broken").glob(".*"))


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    changes = ("data.train_crops_per_epoch=1200", "data.image_size=16")
    arguments = (*photos(*changes), "--variants", "2", "--shard-size", "16", "--batch-size", "4")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "flextok", "latents", str(out), *arguments]
    for kill_after in (3, 20):
        with subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and len(list(out.glob("train-*.safetensors"))) < kill_after:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("train-*.safetensors")}
    in_index = len(json.loads((out / "index.json").read_text())["splits"]["train"]["shards"])
    assert in_index < 75  # of 75 shards: it was killed on the way
    write(out, *arguments)
    redone = [name for name, time_ns in kept.items() if (out / name).stat().st_mtime_ns != time_ns]
    assert len(redone) <= 1
    write(tmp_path / "whole", *arguments)
    for file in (tmp_path / "whole").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_finished_folder_is_left_alone_and_a_damaged_shard_made_anew(tmp_path, caplog):
    arguments = (*photos(), "--shard-size", "8")
    write(tmp_path, *arguments)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    write(tmp_path, *arguments)
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()} == before
    shard = tmp_path / "train-000001.safetensors"
    flip_a_bit(shard)
    write(tmp_path, *arguments)
    assert "train-000001.safetensors is damaged: its checksum is wrong" in caplog.text
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {n: b for n, (_, b) in before.items()}


# --- mistakes ---------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["latent.std=0.5"], r"latent.std=0.75, not 0.5"),
        (["data.seed=1"], "data.seed=0, not 1"),
        (["--dtype", "bf16"], "dtype='fp32', not 'bf16'"),
        (["--shard-size", "100"], "split train: shard_size=300, not 100"),
        (["--variants", "2"], "split train: variants=1, not 2"),
    ],
)
def test_other_settings_are_refused(digits_folder, changed, message):
    flags = [] if "--dtype" in changed else ["--dtype", "fp32"]
    flags += [] if "--shard-size" in changed else ["--shard-size", "300"]
    options = [word for word in changed if not word.startswith("--") and "=" in word]
    rest = [word for word in changed if word not in options]
    with pytest.raises(ValueError, match=message):
        write(digits_folder, *DIGITS, *options, *flags, *rest)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no latents"):
        write(tmp_path, *DIGITS)
    with pytest.raises(ValueError, match=r"no folder of latents.*data=image_folder"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="are latents already"):
        write(tmp_path / "new", "data=latents", f"data.root={tmp_path}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 16}, "data.image_size=16 does not fit .*valid: 8"),
        ({"latent": LATENT | {"channels": 3}}, "latent.channels=3 does not fit .*valid: 1"),
        ({"latent": LATENT | {"mean": 0.0}}, "latent.mean=0.0 does not fit .*valid: -0.39"),
    ],
)
def test_a_model_of_other_latents_is_refused(digits_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        opened(digits_folder, **changes)


def test_a_network_of_another_shape_than_the_settings_is_refused(digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"shape": [16, 4, 4]}))
    with pytest.raises(ValueError, match=r"shape \[16, 4, 4\].*promise \[1, 8, 8\]"):
        opened(tmp_path, latent=LATENT)


def test_a_damaged_shard_is_named(digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "train-000002.safetensors"
    content = shard.read_bytes()
    flip_a_bit(shard)
    with pytest.raises(ValueError, match="train-000002.safetensors is damaged: its checksum"):
        opened(tmp_path)
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"train-000002.safetensors is damaged: \d+ bytes"):
        opened(tmp_path, verify=False)
    shard.write_bytes(b"\xff" * len(content))
    data = opened(tmp_path, verify=False)
    with pytest.raises(ValueError, match="train-000002.safetensors is damaged"):
        data.datasets["train"][700]
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-000002.safetensors is damaged: the file is missing.*again"):
        opened(tmp_path, verify=False)


def test_an_unfinished_folder_is_refused(digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "index.json").read_text())
    index["splits"]["val"]["shards"].pop()
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="split val has 0 of 1 shards"):
        opened(tmp_path)
    del index["splits"]["val"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no split val"):
        opened(tmp_path)


def test_evaluation_asks_for_images(digits_folder):
    sizes = {"image_size": 8, "batch_size": 4, "num_workers": 0}
    data = LatentsDataModule(root=digits_folder, latent=None, features=False, verify=False, **sizes)
    with pytest.raises(ValueError, match="evaluation compares images; choose the images"):
        data.setup("test")


# --- training ---------------------------------------------------------------------------------------------------------


def from_latents(folder, root, *overrides):
    """The config of a short run on latents of digits."""
    data = ("data=latents", f"data.root={root}", "data.num_workers=0")
    latent = [word for word in DIGITS if word.startswith("latent")]
    return small_config(folder, *data, *latent, *overrides)


def test_training_and_validation_give_the_numbers_of_images(digits_folder, tmp_path):
    short = ("trainer.max_steps=2", "trainer.val_check_interval=2", "optimizer.total_steps=2")
    short += ("optimizer.warmup_steps=0",)
    config = from_latents(tmp_path / "latents", digits_folder, *short)
    check_config(config)
    latent = [word for word in DIGITS if word.startswith("latent")]
    ours = run(config)
    theirs = run(small_config(tmp_path / "images", *latent, *short))
    assert repeatable(ours) == repeatable(theirs)
    assert "train/loss" in ours
    assert "val/flow_loss" in ours
    assert (tmp_path / "latents/pictures/step_000002.png").exists()


def test_an_interrupted_run_continues_exactly(digits_folder, tmp_path):
    whole = run(from_latents(tmp_path / "whole", digits_folder))
    first = from_latents(tmp_path / "first", digits_folder)
    first.trainer.max_steps = 5
    run(first)
    second = from_latents(tmp_path / "second", digits_folder)
    second.ckpt_path = str(tmp_path / "first")
    assert repeatable(run(second)) == repeatable(whole)


def test_the_vae_does_not_run(digits_folder, tmp_path, monkeypatch):
    training = build(from_latents(tmp_path, digits_folder))
    monkeypatch.setattr(type(training.module.model.vae), "_encode", None)
    training.data.setup("fit")
    batch = next(iter(training.data.train_dataloader()))
    assert batch["latents"].shape == (400, 1, 8, 8)
    model = training.module.model
    losses = training.module.objective(
        model, {"vae_latents": batch["latents"].split(1), RNG_KEY: torch.Generator().manual_seed(0)}
    )
    assert torch.isfinite(losses["total"])


def test_a_model_that_would_encode_is_refused(digits_folder, tmp_path):
    config = from_latents(tmp_path, digits_folder, "model.vae.force_vae_encode=true")
    with pytest.raises(ValueError, match="force_vae_encode=true.*valid: false"):
        run(config)


def test_training_on_latents_of_a_network(tmp_path):
    write_images(tmp_path / "images", 20)
    vae = ("vae=kl", f"latent.path={RECORDED / 'tiny_vae'}", "latent.channels=4", "data.image_size=32")
    images = ("data=image_folder", f"data.root={tmp_path / 'images'}", "data.num_workers=0")
    write(tmp_path / "latents", *images, *vae, "--shard-size", "8")
    assert load_file(tmp_path / "latents/train-000000.safetensors")["latents"].dtype == torch.bfloat16
    # Not the last of SMALL: later overrides win.
    small = [word for word in SMALL if word not in ("vae=pixel", "data=digits")]
    config = compose(
        [
            *small,
            *("data=latents", f"data.root={tmp_path / 'latents'}", "data.batch_size=4", "data.num_workers=0", *vae),
            *("size.patch=2", "trainer.max_steps=2", "trainer.val_check_interval=2"),
            *("optimizer.total_steps=2", "optimizer.warmup_steps=0", f"paths.run={tmp_path / 'run'}"),
        ]
    )
    check_config(config)
    numbers = run(config)
    assert numbers["val/flow_loss"] > 0
    assert (tmp_path / "run/pictures/step_000002.png").exists()
