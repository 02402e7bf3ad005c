"""Each extractor does to images what it says, and its sum changes with whatever changes its features."""

import re

import pytest
import torch

from flextok.evaluation.features import (
    Dinov2Features,
    InceptionFeatures,
    MissingWeightsError,
    as_extractor,
    sha256_of_module,
)
from tests.evaluation.networks import Flat, Pooled, ScriptedInception, write_inception

CPU = torch.device("cpu")


def images(count=3, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2.4 - 1.2


# --- Inception --------------------------------------------------------------------------------------------------------


def test_the_inception_file_gets_rounded_bytes(tmp_path):
    file = write_inception(tmp_path / "inception.pt")
    extractor = InceptionFeatures(path=file)
    extractor.to(CPU)
    torch.manual_seed(4)
    network = ScriptedInception()
    as_bytes = ((images().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        expected = network(as_bytes, return_features=True)
    torch.testing.assert_close(extractor(images()), expected)
    assert not extractor(images()).requires_grad
    assert "8 bits" in extractor.transform


def test_the_sum_of_the_inception_file_is_that_of_its_bytes(tmp_path):
    file = write_inception(tmp_path / "inception.pt")
    extractor = InceptionFeatures(path=file)
    import hashlib

    assert extractor.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_missing_file_is_named_with_the_place_it_may_be_put(tmp_path):
    file = tmp_path / "weights" / "inception-2015-12-05.pt"
    said = rf"{re.escape(str(file))} does not exist; put https://.*inception-2015-12-05.pt there"
    with pytest.raises(MissingWeightsError, match=said):
        InceptionFeatures(path=file)


@pytest.mark.parametrize("content", ["weights", "text"])
def test_a_file_that_is_no_torchscript_is_refused(content, tmp_path):
    file = tmp_path / "pt_inception.pth"
    if content == "weights":
        torch.save(ScriptedInception().state_dict(), file)
    else:
        file.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"pt_inception\.pth is no TorchScript file.*valid: https") as caught:
        InceptionFeatures(path=file)
    assert not isinstance(caught.value, MissingWeightsError)


# --- DINOv2 -----------------------------------------------------------------------------------------------------------


def test_dinov2_gives_the_class_token_of_resized_and_normalised_images(teacher_folder):
    import transformers

    extractor = Dinov2Features(path=teacher_folder, image_size=16)
    extractor.to(CPU)
    network = transformers.Dinov2Model.from_pretrained(teacher_folder).eval()
    resized = torch.nn.functional.interpolate(images().clamp(-1, 1), (16, 16), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((resized.clamp(-1, 1) + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = network(pixel_values=pixels).pooler_output
    torch.testing.assert_close(extractor(images()), expected)
    assert "16 x 16" in extractor.transform


def test_the_sum_of_a_dinov2_knows_weights_and_heads_but_not_its_folder(teacher_folder, tmp_path):
    import transformers

    network = transformers.Dinov2Model.from_pretrained(teacher_folder)
    network.save_pretrained(tmp_path / "copy")
    network.config.num_attention_heads = 1
    network.save_pretrained(tmp_path / "heads")
    with torch.no_grad():
        network.layernorm.bias[0] += 0.1
    network.config.num_attention_heads = 2
    network.save_pretrained(tmp_path / "weights")
    folders = (teacher_folder, tmp_path / "copy", tmp_path / "heads", tmp_path / "weights")
    original, copy, heads, weights = (Dinov2Features(path=str(f), image_size=16).sha256 for f in folders)
    assert original == copy
    assert len({original, heads, weights}) == 3


def test_a_dinov2_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingWeightsError, match="nowhere.*valid: a folder or a hub name of a DINOv2"):
        Dinov2Features(path=str(tmp_path / "nowhere"), image_size=224)


def test_patches_that_do_not_divide_the_size_are_refused(teacher_folder):
    with pytest.raises(ValueError, match="image_size=15: valid is a multiple of 4"):
        Dinov2Features(path=teacher_folder, image_size=15)


# --- any module -------------------------------------------------------------------------------------------------------


def test_any_module_is_an_extractor_and_sees_clamped_images():
    module = Pooled().train()
    extractor = as_extractor(module, field="f")
    torch.testing.assert_close(extractor(images()), module(images().clamp(-1, 1)))


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"evaluation\.features\.mine builds a dict; valid: a torch module"):
        as_extractor({}, field="evaluation.features.mine")


def test_features_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"gives \[3, 3, 8, 8\] for 3 images; valid: \[B, D\]"):
        as_extractor(Flat(), field="f")(images())


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        as_extractor(Pooled(gain=float("inf")), field="f")(images())


def test_the_sum_of_a_module_knows_its_class_and_its_values():
    sums = [sha256_of_module(module) for module in (Pooled(), Pooled(), Pooled(gain=2.0), Flat(), torch.nn.Identity())]
    assert sums[0] == sums[1]
    assert len(set(sums)) == 4
