"""REPA on features that were computed in advance: what a teacher would say, without the teacher."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from flextok.cli import latent_writer, main, shard_folder
from flextok.config import check_config, compose
from flextok.data.latents import LatentsDataModule
from flextok.model.data_dict import RNG_KEY
from flextok.training.repa import FrozenTeacher
from flextok.training.run import build, run
from flextok.training.validation import model_inputs
from tests.support import REPOSITORY, Interruptions, Killed, max_difference, randomize
from tests.training.support import SMALL, largest_difference, load, small_config

transformers = pytest.importorskip("transformers")

PHOTOS = (
    *("data=photos", "data.names=[chelsea]", "data.image_size=16", "data.batch_size=6", "data.num_workers=0"),
    *("data.train_crops_per_epoch=24", "data.num_eval_crops=4"),
)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return teacher_folder


def write(folder, teacher, *arguments):
    features = [] if teacher is None else ["--features", teacher]
    return main(["--traceback", "latents", str(folder), "vae=pixel", *PHOTOS, *map(str, arguments), *features])


@pytest.fixture(scope="module")
def cached(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "fp32"
    assert write(folder, teacher, "--dtype", "fp32", "--shard-size", "10") == 0
    return folder


def images_config(folder, *overrides):
    small = [word for word in SMALL if not word.startswith("data") and not word.startswith("vae")]
    repa = ("objective=repa", "objective.repa.hidden_dim=24", "objective.repa.teacher=null")
    cfg = compose([*small, "vae=pixel", *PHOTOS, *repa, f"paths.run={folder}", *overrides])
    check_config(cfg)
    return cfg


def cached_config(folder, cached, *overrides):
    small = [word for word in SMALL if not word.startswith(("data", "vae"))]
    data = ("data=latents", f"data.root={cached}", "data.image_size=16", "data.batch_size=6", "data.num_workers=0")
    repa = ("objective=repa", "objective.repa.hidden_dim=24", "objective.repa.teacher=null")
    cfg = compose([*small, "vae=pixel", *data, *repa, f"paths.run={folder}", *overrides])
    check_config(cfg)
    return cfg


def photos():
    images = instantiate(compose([*PHOTOS]).data)
    images.setup("predict")
    return images.datasets


def opened(folder, **changes):
    settings = {"root": folder, "latent": None, "verify": True, "image_size": 16, "batch_size": 4, "num_workers": 0}
    data = LatentsDataModule(**({"features": True} | settings | changes))
    data.setup("fit")
    return data


# --- what comes back --------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_teacher_for_every_variant(teacher, tmp_path):
    for dtype in ("fp32", "bf16"):
        write(tmp_path / dtype, teacher, "--dtype", dtype, "--variants", "2", "--shard-size", "10")
    network, dataset = FrozenTeacher.load(teacher), photos()["train"]
    stored = opened(tmp_path / "fp32").datasets["train"]
    rounded = opened(tmp_path / "bf16").datasets["train"]
    for number in range(0, len(dataset), 5):
        by_key = {s["key"]: s for s in (dataset.variant(number, variant) for variant in range(2))}
        seen = set()
        for epoch in range(2):
            sample, coarse = stored[epoch, number], rounded[epoch, number]
            seen.add(sample["key"])
            expected = network(by_key[sample["key"]]["image"][None], (4, 4))[0]
            assert sample["features"].shape == (4, 4, 16)
            assert max_difference(sample["features"], expected) < 1e-5
            assert coarse["features"].dtype == torch.bfloat16
            assert torch.equal(coarse["features"], sample["features"].bfloat16())
        assert seen == by_key.keys()


def test_only_training_reads_them_and_only_if_asked(cached):
    data = opened(cached)
    assert "features" in data.datasets["train"][0]
    assert "features" not in data.datasets["val"][0]
    assert "features" not in opened(cached, features=False).datasets["train"][0]
    assert next(iter(data.train_dataloader()))["features"].shape == (4, 4, 4, 16)


def test_the_size_can_be_asked_for(teacher, tmp_path):
    write(tmp_path, teacher, "--feature-size", "2", "--splits", "val")
    assert load_file(tmp_path / "val-000000.safetensors")["features"].shape == (4, 1, 2, 2, 16)
    assert json.loads((tmp_path / "index.json").read_text())["features_shape"] == [2, 2, 16]


def test_latents_are_those_of_a_folder_without_features(cached, tmp_path):
    write(tmp_path, None, "--dtype", "fp32", "--shard-size", "10")
    for file in tmp_path.glob("*.safetensors"):
        plain, with_features = load_file(file), load_file(cached / file.name)
        assert with_features.keys() - plain.keys() == {"features"}
        assert all(torch.equal(tensor, with_features[name]) for name, tensor in plain.items())


# --- training ---------------------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_the_running_teacher(teacher, cached, tmp_path):
    training = build(cached_config(tmp_path, cached))
    training.data.setup("fit")
    batch = next(iter(training.data.train_dataloader()))
    dataset = photos()["train"]
    images = {sample["key"]: sample["image"] for sample in (dataset.variant(n, 0) for n in range(len(dataset)))}
    seen = {"image": torch.stack([images[key] for key in batch["key"]]), "key": batch["key"]}
    running = instantiate(images_config(tmp_path, f"objective.repa.teacher={teacher}").objective, _convert_="all")
    assert running.repa.teacher is not None
    ours, model = training.module.objective, randomize(training.module.model).train()
    assert ours.repa.teacher is None
    running.load_state_dict(ours.state_dict())
    results = []
    for objective, inputs in ((ours, batch), (running, seen)):
        model.zero_grad()
        objective.zero_grad()
        model.vae.force_vae_encode = "image" in inputs
        data = model_inputs(model, inputs)
        losses = objective(model, {**data, RNG_KEY: torch.Generator().manual_seed(0)})
        losses["total"].backward()
        parameters = [*model.named_parameters(), *objective.named_parameters()]
        results.append((losses, {name: p.grad.clone() for name, p in parameters if p.grad is not None}))
    (losses, gradients), (expected, expected_gradients) = results
    assert losses.keys() == expected.keys()
    assert all(max_difference(losses[name], expected[name]) < 1e-6 for name in losses)
    assert abs(losses["repa"].item()) > 1e-3
    assert gradients.keys() == expected_gradients.keys()
    assert any(name.startswith("repa.projector") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_an_interrupted_run_continues_exactly(cached, tmp_path, monkeypatch):
    # Nobody loads a teacher.
    monkeypatch.setattr(FrozenTeacher, "load", None)
    numbers = run(cached_config(tmp_path / "full", cached))
    assert numbers["train/repa"] < 1
    first = cached_config(tmp_path / "first", cached)
    first.trainer.max_steps = 5
    run(first)
    run(cached_config(tmp_path / "rest", cached, f"ckpt_path={tmp_path / 'first'}"))
    full, rest = load(tmp_path / "full"), load(tmp_path / "rest")
    for part in ("state_dict", "ema", "optimizer_states"):
        assert largest_difference(full[part], rest[part]) == 0.0, part


@pytest.mark.parametrize("objective", ["rectified_flow", "prefix_and_full"])
def test_other_objectives_have_no_teacher(cached, objective):
    assert compose(["data=latents", f"data.root={cached}", f"objective={objective}"]).objective.repa is None


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_interruptions_change_nothing(teacher, tmp_path, monkeypatch):
    arguments = ("--variants", "2", "--shard-size", "4", "--batch-size", "3")
    write(tmp_path / "whole", teacher, *arguments)
    generator, interruptions = random.Random(0), Interruptions(monkeypatch)
    interruptions.may_strike(latent_writer, "shard_tensors", "save_file")
    interruptions.may_strike(shard_folder, "sha256_of")
    for _ in range(3):
        interruptions.calls_left = generator.randint(0, 8)
        with pytest.raises(Killed):
            write(tmp_path / "broken", teacher, *arguments)
    monkeypatch.undo()
    write(tmp_path / "broken", teacher, *arguments)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_killed_process_goes_on(teacher, tmp_path):
    arguments = ("data.train_crops_per_epoch=400", "--shard-size", "8", "--batch-size", "4")
    out = tmp_path / "killed"
    words = ("vae=pixel", *PHOTOS, *arguments, "--features", teacher)
    command = [sys.executable, "-m", "flextok", "latents", str(out), *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=variables, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(out.glob("train-*.safetensors"))) < 5:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    write(out, teacher, *arguments)
    write(tmp_path / "whole", teacher, *arguments)
    for file in (tmp_path / "whole").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_folders_and_teachers_that_do_not_fit_are_refused(teacher, cached, tmp_path):
    with pytest.raises(Exception, match=r"objective.repa.teacher='other' does not fit data.root=.*or null"):
        build(cached_config(tmp_path, cached, "objective.repa.teacher=other"))
    write(tmp_path / "plain", None)
    with pytest.raises(Exception, match=r"holds no features, which objective=repa needs; valid: .*--features"):
        build(cached_config(tmp_path, tmp_path / "plain"))
    with pytest.raises(Exception, match=r"objective.repa.teacher=None cannot be used with images"):
        build(small_config(tmp_path, "objective=repa", "objective.repa.teacher=null"))
    with pytest.raises(ValueError, match=r"objective.repa needs 'teacher_features'.*data.features=true"):
        run(cached_config(tmp_path / "run", cached, "data.features=false"))
    write(tmp_path / "coarse", teacher, "--feature-size", "2")
    with pytest.raises(ValueError, match=r"features of \[2, 2\] patches, but the decoder has \[4, 4\]; .*size 4"):
        run(cached_config(tmp_path / "run", tmp_path / "coarse"))


def test_another_teacher_in_the_same_folder_is_refused(teacher, cached, tmp_path):
    folder = tmp_path / "teacher"
    torch.manual_seed(4)
    transformers.Dinov2Model(transformers.Dinov2Config.from_pretrained(teacher)).save_pretrained(folder)
    shutil.copytree(cached, tmp_path / "cached")
    again = ("--dtype", "fp32", "--shard-size", "10")
    with pytest.raises(ValueError, match=r"features.teacher='.*', not '.*teacher'"):
        write(tmp_path / "cached", str(folder), *again)
    with pytest.raises(ValueError, match=r"features={.*}, not None"):
        write(tmp_path / "cached", None, *again)
    with pytest.raises(ValueError, match=r"features.size=4, not 2"):
        write(tmp_path / "cached", teacher, *again, "--feature-size", "2")


def test_words_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--feature-size=2 has no --features"):
        write(tmp_path, None, "--feature-size", "2")
    with pytest.raises(ValueError, match=r"--features='.*nothing' cannot be loaded"):
        write(tmp_path, str(tmp_path / "nothing"))
