"""`tokenize --target` with networks: as few tokens as the network allows, and never of two networks in one folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextok.cli import token_target
from flextok.data.token_shards import TokenShards
from flextok.data.transforms import decode, resize_shorter_center_crop, to_tensor
from flextok.evaluation.features import Dinov2Features, InceptionFeatures, sha256_of_module
from flextok.evaluation.lpips import LPIPS
from flextok.evaluation.source import find_source
from flextok.evaluation.targets import cosine_distances
from flextok.reconstruct import decode_tokens, encode_images
from tests.cli.test_tokenize import ids, tokenize
from tests.data_modules.images import write_images
from tests.evaluation.networks import write_inception
from tests.evaluation.test_lpips import write_weights
from tests.support import export_small_model

SIZE = 32  # AlexNet sees nothing in smaller ones.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_small_model(tmp_path_factory.mktemp("models") / "small", f"data.image_size={SIZE}", "size.patch=4")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 8)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("weights")
    return {
        "lpips": write_weights("alex", folder / "alex.pth"),
        "lpips_vgg": write_weights("vgg", folder / "vgg.safetensors"),
        "inception": write_inception(folder / "inception.pt"),
        "dinov2": teacher_folder,
    }


@pytest.fixture(autouse=True)
def small_input(monkeypatch):
    monkeypatch.setattr(token_target, "DINOV2_SIZE", 16)


def distances(metric, file, ours, truth):
    if metric.startswith("lpips"):
        network = LPIPS(network="vgg" if metric == "lpips_vgg" else "alex", path=file, heads=None)
        return network(ours.clamp(-1, 1), truth).tolist()
    built = InceptionFeatures(path=file) if metric == "inception" else Dinov2Features(path=file, image_size=16)
    return cosine_distances(built(ours), built(truth))


def measured(model, images, metric, file):
    """`{key: distances at 1 to 8 tokens}`."""
    keys = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    truth = torch.stack([to_tensor(resize_shorter_center_crop(decode(images / key), SIZE)) for key in keys])
    loaded = find_source(str(model), runs=images).load(weights="ema")[0]
    with torch.no_grad():
        encoded = encode_images(loaded, truth, keys, seed=0)
        columns = [
            distances(metric, file, decode_tokens(loaded, encoded, keep_k=k, seed=0, timesteps=2), truth)
            for k in range(1, 9)
        ]
    return dict(zip(keys, zip(*columns, strict=True), strict=True))


@pytest.mark.parametrize("metric", ["lpips", pytest.param("lpips_vgg", marks=pytest.mark.slow), "inception", "dinov2"])
def test_tokens_are_as_few_as_the_network_allows(metric, images, model, weights, tmp_path):
    known = measured(model, images, metric, weights[metric])
    everything = sorted(distance for row in known.values() for distance in row)
    value = everything[len(everything) // 2]
    target = ("--target", f"{metric}={value + 1e-7}", "--target-weights", weights[metric], "--steps", 2)
    tokenize(images, tmp_path, model, *target, "--batch-size", 3)
    found = ids(tmp_path)
    assert len({len(row) for row in found.values()}) > 1
    for key, row in found.items():
        assert known[key][len(row) - 1] <= value + 1e-5 or len(row) == 8
        assert len(row) == 1 or known[key][len(row) - 2] > value - 1e-5


def test_the_index_names_the_network_and_another_is_refused(images, model, weights, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.pth"
    target = ("--target", "lpips=0.5", "--steps", 1, "--target-weights")
    tokenize(images, out, model, *target, weights["lpips"])
    stored = TokenShards(out).metadata["target"]
    network = LPIPS(network="alex", path=weights["lpips"], heads=None)
    assert stored == {
        "lpips": 0.5,
        "network": {"sha256": sha256_of_module(network)},
        **{"timesteps": 1, "guidance_scale": 1.0, "perform_norm_guidance": False},
    }
    before = (out / "index.json").read_bytes()
    changed = {name: tensor + 1e-3 for name, tensor in torch.load(weights["lpips"], weights_only=True).items()}
    torch.save(changed, other)
    with pytest.raises(ValueError, match=r"holds tokens made with target\.network\.sha256='[0-9a-f]{64}', not"):
        tokenize(images, out, model, *target, other)
    # The same network elsewhere is the same.
    tokenize(images, out, model, *target, shutil.copy(weights["lpips"], tmp_path / "copy.pth"))
    assert (out / "index.json").read_bytes() == before


def test_the_index_says_how_features_are_compared(images, model, weights, tmp_path):
    folder = tmp_path / "dinov2"
    shutil.copytree(weights["dinov2"], folder)
    target = ("--target", "dinov2=0.5", "--steps", 1, "--target-weights")
    tokenize(images, tmp_path / "out", model, *target, weights["dinov2"])
    network = json.loads((tmp_path / "out/index.json").read_text())["settings"]["target"]["network"]
    assert network["distance"] == "1 - cosine"
    assert "resized to 16 x 16 pixels" in network["transform"]
    save_file({n: t + 1e-3 for n, t in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"target\.network\.sha256="):
        tokenize(images, tmp_path / "out", model, *target, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "lpips=0.2"], "--target lpips=0.2 needs --target-weights: alexnet-owt-7be5be79.pth of torchvis"),
        (["--target", "lpips=0.2", "--target-weights", "no.pth"], "no.pth does not exist; put https://.*alexnet"),
        (["--target", "lpips_vgg=0.2", "--target-weights", "no.pth"], "no.pth does not exist; put https://.*vgg16"),
        (["--target", "inception=0.2", "--target-weights", "no.pt"], "no.pt does not exist; put https://.*inception"),
        (["--target", "dinov2=0.2", "--target-weights", "nowhere/no"], "nowhere/no.*or name another place"),
        (
            ["--target", "psnr=20", "--target-weights", "no.pt"],
            "--target-weights=no.pt: psnr is measured without a net",
        ),
        (["--target-weights", "no.pt"], "--target-weights=no.pt: without --target it has no meaning"),
    ],
)
def test_what_is_missing_or_too_much_is_said_before_anything_is_written(options, message, images, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        tokenize(images, tmp_path / "out", model, *options)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_refused(images, model, weights, tmp_path):
    with pytest.raises(ValueError, match="does not hold the weights of this network"):
        tokenize(images, tmp_path / "out", model, "--target", "lpips=0.2", "--target-weights", weights["lpips_vgg"])
