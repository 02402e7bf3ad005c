"""LPIPS equals that of torchmetrics, whose backbone needs a library that is not here: it is lent ours."""

import re
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.functional.image import lpips as theirs

from flextok.evaluation.features import MissingWeightsError
from flextok.evaluation.lpips import LPIPS, _layers


def write_weights(network, file):
    """Random weights under the names of torchvision, and one of those that are not needed."""
    torch.manual_seed(6)
    weights = {f"features.{name}": tensor for name, tensor in _layers(network).state_dict().items()}
    weights["classifier.1.weight"] = torch.zeros(2, 2)
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)
    return file


def pair(size):
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(3, 3, size, size, generator=generator) * 2 - 1
    return images, (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


class Lent(torch.nn.Module):
    """Feature maps of given layers under the interface of torchmetrics."""

    layers, taps = None, ()

    def __init__(self, **options):
        super().__init__()

    def forward(self, x):
        maps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                maps.append(x)
        return namedtuple("Maps", [f"relu{i}" for i in range(len(maps))])(*maps)


# Positions of the ReLUs that the paper compares, in torchvision's numbering.
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}


@pytest.mark.parametrize(
    ("network", "suffix", "size"), [("alex", ".pth", 64), ("alex", ".safetensors", 31), ("vgg", ".pth", 32)]
)
def test_it_equals_torchmetrics(network, suffix, size, tmp_path, monkeypatch):
    ours = LPIPS(network=network, path=write_weights(network, tmp_path / f"weights{suffix}"), heads=None)
    monkeypatch.setattr(Lent, "layers", ours.layers)
    monkeypatch.setattr(Lent, "taps", TAPS[network])
    monkeypatch.setattr(theirs, "Alexnet" if network == "alex" else "Vgg16", Lent)
    reference = theirs._LPIPS(net=network)
    x, y = pair(size)
    expected = reference(x, y).flatten()
    assert expected.min() > 0
    torch.testing.assert_close(ours(x, y), expected, rtol=1e-4, atol=1e-7)
    assert ours(x, x).tolist() == [0.0] * 3


def test_alexnet_and_vgg_have_the_layers_of_torchvision():
    alex = {name: list(tensor.shape) for name, tensor in _layers("alex").state_dict().items() if "weight" in name}
    assert alex == {
        "0.weight": [64, 3, 11, 11],
        "3.weight": [192, 64, 5, 5],
        "6.weight": [384, 192, 3, 3],
        "8.weight": [256, 384, 3, 3],
        "10.weight": [256, 256, 3, 3],
    }
    vgg = [name for name in _layers("vgg").state_dict() if "weight" in name]
    assert vgg == [f"{i}.weight" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]


def test_a_missing_file_is_named_with_the_place_it_may_be_put(tmp_path):
    file = tmp_path / "alexnet-owt-7be5be79.pth"
    with pytest.raises(MissingWeightsError, match=rf"{re.escape(str(file))} does not exist; put https://.*alexnet"):
        LPIPS(network="alex", path=file, heads=None)


def test_the_weights_of_another_network_are_refused(tmp_path):
    file = write_weights("vgg", tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"vgg\.pth does not hold the weights of this network: 0\.weight"):
        LPIPS(network="alex", path=file, heads=None)
    file.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"vgg\.pth holds no weights that can be read"):
        LPIPS(network="vgg", path=file, heads=None)


def test_heads_can_be_given(tmp_path):
    file = write_weights("alex", tmp_path / "alex.pth")
    widths = (64, 192, 384, 256, 256)
    torch.save({f"lin{i}.model.1.weight": torch.zeros(1, w, 1, 1) for i, w in enumerate(widths)}, tmp_path / "h.pth")
    assert LPIPS(network="alex", path=file, heads=tmp_path / "h.pth")(*pair(40)).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match=r"alex\.pth does not hold the weights"):
        LPIPS(network="alex", path=file, heads=file)


def test_images_that_are_too_small_are_refused(tmp_path):
    lpips = LPIPS(network="alex", path=write_weights("alex", tmp_path / "alex.pth"), heads=None)
    with pytest.raises(ValueError, match="at least 31 pixels a side, these have 30x30"):
        lpips(*pair(30))


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="network='squeeze': valid are alex, vgg"):
        LPIPS(network="squeeze", path="x", heads=None)
