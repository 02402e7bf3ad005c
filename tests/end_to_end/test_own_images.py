"""One's own images and a pretrained VAE: from the first step to a checkpoint that loads without a network."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flextok import FlexTokFromHub
from flextok.training.checkpoints import load_run
from tests.end_to_end.support import decode, evaluate, export, outline, rows, train
from tests.support import RECORDED, REPOSITORY, max_difference


@pytest.fixture
def photographs(tmp_path):
    """12 JPEGs, no two of one size, in two folders."""
    generator = np.random.default_rng(0)
    for index in range(12):
        folder = tmp_path / "images" / ("indoors", "outdoors")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((20 + 7 * index, 90 - 5 * index)).save(folder / f"{index}.jpg")
    return tmp_path / "images"


def test_a_folder_of_jpegs_is_trained_on_and_evaluated(photographs, tmp_path):
    data = ("data=image_folder", f"data.root={photographs}", "data.image_size=32", "data.num_workers=0")
    splits = ("data.val_fraction=0.25", "data.test_fraction=0.25")
    run = tmp_path / "run"
    train(run, "model=tiny", *data, *splits, "data.batch_size=4", "trainer.max_steps=4", "trainer.val_check_interval=2")
    assert [row["step"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert all(np.isfinite(float(row["train/loss"])) for row in rows(run))
    metrics = evaluate(run, tmp_path / "evaluation")
    assert 1 <= metrics["protocol"]["num_images"] <= 6
    assert metrics["protocol"]["data"]["root"] == str(photographs)
    assert [row["keep_k"] for row in metrics["results"]] == [1, 2, 4, 8, 16]
    assert all(np.isfinite(row["psnr"]) for row in metrics["results"])


def test_latents_of_a_vae_are_trained_on_and_the_export_loads_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    vae = ("vae=kl", "latent.path=tests/data/flextok/tiny_vae", "latent.channels=4", "size.patch=2")
    two_steps = ("trainer.max_steps=2", "trainer.val_check_interval=2", "optimizer.warmup_steps=1", "data.batch_size=4")
    run = tmp_path / "run"
    train(run, "model=tiny", *vae, "data=digits", "data.image_size=64", *two_steps)
    folder = export(run, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    published = json.loads((RECORDED / "tiny_flextok" / "config.json").read_text())
    assert config["vae"].keys() <= published["vae"].keys()
    rest = published.keys() - {"_target_", "vae"}
    assert {part: outline(config[part]) for part in rest} == {part: outline(published[part]) for part in rest}

    trained, loaded = load_run(run)[0], FlexTokFromHub.from_pretrained(folder)
    assert loaded.downsample_factor == 8
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    tokens = tokenize(trained, images)
    assert all(torch.equal(ours, ids) for ours, ids in zip(tokenize(loaded, images), tokens, strict=True))
    expected = decode(trained, tokens, keep_k=16, size=8)
    assert expected.shape == (2, 3, 64, 64)
    assert max_difference(decode(loaded, tokens, keep_k=16, size=8), expected) < 1e-5
    state = trained.vae.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.vae.state_dict().items())


def tokenize(model, images):
    torch.manual_seed(0)  # The posterior of the VAE is sampled.
    return model.tokenize(images)
