"""The demo computes what the library and the commands do, each thing once, and remembers a limited number of them."""

import re

import pytest
import torch

from flextok.cli import main
from flextok.data.transforms import resize_shorter_center_crop, to_tensor, to_uint8
from flextok.demo.workbench import Sampling, Workbench
from flextok.reconstruct import decode_tokens, encode_images
from tests.data_modules.images import noise_image
from tests.demo.support import PLAIN, load_workbench

PICTURE = noise_image(3, (30, 20))


def test_reconstructions_are_those_of_the_library(workbench):
    for model, reading in zip(workbench.models, workbench.read(PICTURE, "cat.png"), strict=True):
        square = to_tensor(resize_shorter_center_crop(PICTURE, 8))[None]
        assert torch.equal(reading.square, square)
        with torch.no_grad():
            encoded = encode_images(model.model, square, ["cat.png"], seed=0)
            assert reading.token_ids == encoded.tokens[0].flatten().tolist()
            for shown in workbench.reconstruct(reading, [1, model.num_tokens], PLAIN):
                alone = decode_tokens(model.model, encoded, keep_k=shown.keep_k, seed=0, timesteps=1)
                # Batches of another size round differently in the last bit.
                assert (to_uint8(alone[0]).int() - shown.image.int()).abs().max() <= 1


def test_psnr_is_that_of_the_command(model_folders, workbench, tmp_path, capsys):
    PICTURE.save(tmp_path / "cat.png")
    words = ["reconstruct", str(tmp_path / "cat.png"), str(tmp_path / "out.png"), "--checkpoint", str(model_folders[0])]
    assert main([*words, "--keep-k", "1", "4", "--steps", "1"]) == 0
    printed = re.findall(r"^ +\d+ +[\d.]+ +([\d.]+)$", capsys.readouterr().out, flags=re.MULTILINE)
    reading = workbench.read(PICTURE, "cat.png")[0]
    assert [f"{shown.psnr:.2f}" for shown in workbench.reconstruct(reading, [1, 4], PLAIN)] == printed


@pytest.fixture
def decoded(workbench, monkeypatch):
    """The numbers of tokens of each batch that is decoded."""
    batches, decode = [], Workbench._decode
    monkeypatch.setattr(Workbench, "_decode", lambda self, *args: batches.append(args[1]) or decode(self, *args))
    return batches


def test_a_slider_that_comes_back_decodes_nothing(workbench, decoded):
    reading, other = workbench.read(PICTURE, "cat.png")
    first = workbench.reconstruct(reading, [2, 3], PLAIN)
    again = workbench.reconstruct(reading, [3, 1, 2], PLAIN)
    assert decoded == [[2, 3], [1]]
    assert (again[0], again[2]) == (first[1], first[0])
    workbench.reconstruct(workbench.read(PICTURE, "cat.png")[0], [2], PLAIN)
    assert decoded == [[2, 3], [1]]


def test_another_image_name_model_or_setting_is_another_reconstruction(workbench, decoded):
    reading, other = workbench.read(PICTURE, "cat.png")
    workbench.reconstruct(reading, [2], PLAIN)
    workbench.reconstruct(other, [2], PLAIN)
    workbench.reconstruct(workbench.read(PICTURE, "dog.png")[0], [2], PLAIN)
    workbench.reconstruct(workbench.read(noise_image(4, (30, 20)), "cat.png")[0], [2], PLAIN)
    workbench.reconstruct(reading, [2], Sampling(timesteps=2, guidance_scale=1.0, perform_norm_guidance=False))
    assert decoded == [[2]] * 5


def test_what_was_not_looked_at_longest_is_forgotten(model_folders, decoded):
    small = load_workbench(model_folders[0], max_remembered=2)
    (reading,) = small.read(PICTURE, "cat.png")
    for keep_k in (1, 2, 1, 3, 1, 2):
        small.reconstruct(reading, [keep_k], PLAIN)
    assert decoded == [[1], [2], [3], [2]]
    # More at once than are remembered are still all given.
    assert [shown.keep_k for shown in small.reconstruct(reading, [4, 5, 6, 7], PLAIN)] == [4, 5, 6, 7]


@pytest.mark.parametrize(("steps", "guidance"), [(0, 1.0), (101, 1.0), (1, 0.5), (1, 15.5), (1, float("nan"))])
def test_settings_that_take_for_ever_are_refused(steps, guidance):
    with pytest.raises(ValueError, match="valid are 1 "):
        Sampling(timesteps=steps, guidance_scale=guidance, perform_norm_guidance=False)


def test_without_a_model_there_is_nothing_to_show():
    with pytest.raises(ValueError, match="no model"):
        Workbench([], seed=0, max_remembered=1)
