"""`reconstruct`: the numbers it prints are those of the model, and the picture is there."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from flextok.cli import main
from flextok.cli.loaded_model import image_size_of
from flextok.data.transforms import decode, resize_shorter_center_crop, to_pil, to_tensor
from flextok.evaluation.reconstruction import image_metrics
from flextok.evaluation.source import find_source
from flextok.reconstruct import decode_tokens, encode_images
from tests.data_modules.images import noise_image
from tests.support import RECORDED, export_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def image(tmp_path):
    noise_image(3, (30, 20)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def reconstruct(*words):
    return main(["--traceback", "reconstruct", *(str(word) for word in words)])


def test_bits_and_psnr_are_those_of_the_model(model, image, tmp_path, capsys):
    out = tmp_path / "new/folder/cat_tokens.png"
    assert reconstruct(image, out, "--checkpoint", model, "--keep-k", 8, 1, "--steps", 3, "--seed", 5) == 0
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, flags=re.MULTILINE)
    loaded = find_source(str(model), runs=tmp_path).load(weights="ema")[0]
    square = to_tensor(resize_shorter_center_crop(decode(image), 8))[None]
    with torch.no_grad():
        encoded = encode_images(loaded, square, ["cat.png"], seed=5)
        for keep_k, (shown, bits, psnr) in zip((1, 8), rows, strict=True):
            decoded = decode_tokens(loaded, encoded, keep_k=keep_k, seed=5, timesteps=3)
            assert int(shown) == keep_k
            assert float(bits) == pytest.approx(keep_k * np.log2(64000), abs=0.06)
            assert float(psnr) == pytest.approx(image_metrics(decoded, square)["psnr"][0], abs=0.006)
    picture = np.asarray(Image.open(out))
    # Enlarged eightfold, below each other at the right: the original is the first.
    assert (picture[12:76:8, -76:-12:8] == np.asarray(to_pil(square[0]))).all()


def test_without_a_name_the_picture_lies_here_and_shows_powers_of_two(model, image, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    reconstruct(image, "--checkpoint", model, "--steps", 1)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["cat_reconstructed.png"]
    assert re.findall(r"^ +(\d+) ", capsys.readouterr().out, flags=re.MULTILINE) == ["1", "2", "4", "8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-k", 9], r"--keep-k \[9\]: valid are 1 to 8"),
        (["--keep-k", 0, 4], r"--keep-k \[0, 4\]"),
        (["--steps", 0], "--steps is 0"),
        (["--image-size", 3], "multiples of 4"),
        (["out.jpg"], "OUT: out.jpg; valid: the name of a .png file"),
    ],
)
def test_impossible_options_are_refused(options, message, model, image):
    with pytest.raises(ValueError, match=message):
        reconstruct(image, *options, "--checkpoint", model)


def test_the_image_itself_is_never_overwritten(model, image):
    before = image.read_bytes()
    with pytest.raises(ValueError, match="other than FILE"):
        reconstruct(image, image, "--checkpoint", model)
    assert image.read_bytes() == before


def test_files_that_are_none_are_refused(model, tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(ValueError, match="is no file"):
            reconstruct(path, "--checkpoint", model)


def test_models_know_the_size_of_their_images(recorded_folder, model, tmp_path):
    published = ("model=flextok_d12_d12", "size.encoder_depth=1", "size.decoder_depth=1", "data.image_size=256")
    vae = ("vae=kl", f"latent.path={RECORDED / 'tiny_vae'}", "latent.channels=4")
    released = export_small_model(tmp_path / "released", *published, *vae)
    for folder, size in ((model, 8), (released, 256)):
        loaded = find_source(str(folder), runs=tmp_path).load(weights="ema")[0]
        assert image_size_of(loaded, None) == size
        assert image_size_of(loaded, size // 2) == size // 2
