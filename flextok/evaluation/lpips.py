"""LPIPS (arXiv 1801.03924): how different two images look to a network trained to classify photographs."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flextok.evaluation.features import MissingWeightsError

# Layers up to the last compared one, in torchvision's order: a width is a convolution of 3 x 3 and its ReLU.
_VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
# The same as (width, kernel, stride, padding).
_ALEX = ((64, 11, 4, 2), "pool", (192, 5, 1, 2), "pool", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
# The layers whose output is compared.
_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_MIN_SIZE = {"alex": 31, "vgg": 16}
_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distances `[B]` of images `[B, 3, H, W]` in [-1, 1], version 0.1 with linear heads.

    Args:
        network: `alex`, usual for reporting, or `vgg`.
        path: the classifier's weights as torchvision publishes them, `.pth` or the same names as `.safetensors`.
        heads: a file of the linear heads (`lin0.model.1.weight`, ...); null for those that come with torchmetrics.

    Raises:
        MissingWeightsError: a file does not exist.
        ValueError: an unknown network, or a file that holds other weights.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, *, network: str, path: str | Path, heads: str | Path | None) -> None:
        super().__init__()
        if network not in _TAPS:
            raise ValueError(f"evaluation.distances.<name>.network={network!r}: valid are {', '.join(_TAPS)}")
        self._network = network
        weights = _read(Path(path).expanduser(), hint=f"https://download.pytorch.org/models/{_FILES[network]}")
        self.layers = _layers(network)
        wanted = self.layers.state_dict()
        found = {name: weights.get(f"features.{name}") for name in wanted}
        _check(found, wanted, path)
        self.layers.load_state_dict(found)
        taps = [wanted[f"{tap - 1}.weight"].shape[0] for tap in _TAPS[network]]
        file = _torchmetrics_heads(network) if heads is None else Path(heads).expanduser()
        lines = _read(file, hint="null, for the heads that come with torchmetrics,")
        found = {f"{index}": lines.get(f"lin{index}.model.1.weight") for index in range(len(taps))}
        _check(found, {f"{index}": torch.empty(1, width, 1, 1) for index, width in enumerate(taps)}, file)
        for name, head in found.items():
            self.register_buffer(f"head{name}", head)
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Raises ValueError for images that are too small for the network."""
        smallest = _MIN_SIZE[self._network]
        if min(x.shape[-2:]) < smallest:
            raise ValueError(
                f"evaluation.distances: LPIPS with {self._network} needs images of at least {smallest} pixels a side, "
                f"these have {x.shape[-2]}x{x.shape[-1]}; leave it out"
            )
        total = x.new_zeros(len(x))
        for index, (a, b) in enumerate(zip(self._features(x), self._features(y), strict=True)):
            head: Tensor = getattr(self, f"head{index}")
            total = total + ((_unit(a) - _unit(b)).square() * head[0]).sum(dim=1).mean(dim=(1, 2))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        maps, values = [], (images - self.shift) / self.scale
        for start, end in pairwise((-1, *_TAPS[self._network])):
            values = self.layers[start + 1 : end + 1](values)
            maps.append(values)
        return maps


def _layers(network: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    plan: Any = _ALEX if network == "alex" else [step if step == "pool" else (step, 3, 1, 1) for step in _VGG]
    for step in plan:
        if step == "pool":
            layers.append(nn.MaxPool2d(3 if network == "alex" else 2, stride=2))
        else:
            width, kernel, stride, padding = step
            layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _read(file: Path, *, hint: str) -> dict[str, Any]:
    if not file.is_file():
        raise MissingWeightsError(f"{file} does not exist; put {hint} there")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} holds no weights that can be read ({error}); valid: {hint}") from error


def _check(found: dict[str, Any], wanted: dict[str, Tensor], path: str | Path) -> None:
    wrong = [name for name, tensor in found.items() if getattr(tensor, "shape", None) != wanted[name].shape]
    if wrong:
        raise ValueError(
            f"{path} does not hold the weights of this network: {wrong[0]} is missing or not of shape "
            f"{list(wanted[wrong[0]].shape)}"
        )


def _torchmetrics_heads(network: str) -> Path:
    from torchmetrics.functional.image import lpips

    return Path(lpips.__file__).parent / "lpips_models" / f"{network}.pth"
