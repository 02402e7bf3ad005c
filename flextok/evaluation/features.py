"""Networks that turn images into feature vectors, for Fréchet distance and KID: Inception, DINOv2, or any module."""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.data.shard_index import sha256_of
from flextok.data.transforms import to_uint8
from flextok.provenance import weights_sha256

# What a config of transformers says about the file, not the network.
_NOT_SETTINGS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


class MissingWeightsError(ValueError):
    """Weights that are not on this machine: the metrics that need them are left out, all others are reported."""


class FeatureExtractor(ABC):
    """Images `[B, 3, H, W]` in [-1, 1] to features `[B, D]`.

    Attributes:
        sha256: of the weights; features of two extractors with the same sum and `transform` can be compared.
        transform: what happens to the images first, in words.
    """

    sha256: str
    transform: str

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move the network to a device."""

    @abstractmethod
    def features(self, images: Tensor) -> Any:
        """Features `[B, D]` of `[B, 3, H, W]` images in [-1, 1], on the device of the network."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features, checked, and on every device in full float32 precision.

        Raises:
            ValueError: they are not `[B, D]`, or not finite.
        """
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features = self.features(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"evaluation.features: a network gives {shape} for {len(images)} images; valid: [B, D]")
        if not torch.isfinite(features).all():
            raise ValueError("evaluation.features: a network gives features that are not finite")
        return features


class InceptionFeatures(FeatureExtractor):
    """The 2,048 pooled features of the Inception that the published FID is made with.

    Args:
        path: NVIDIA's TorchScript file `inception-2015-12-05.pt`, or one that is called like it: with uint8 images
            `[B, 3, H, W]` and `return_features=True`; it resizes and normalises them itself. TorchScript is code, so
            name only files that you trust.

    Raises:
        MissingWeightsError: there is no such file.
        ValueError: it is no TorchScript, such as a file that holds weights only.
    """

    def __init__(self, *, path: str | Path) -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise MissingWeightsError(f"{file} does not exist; put {INCEPTION_URL} there")
        try:
            self._network = torch.jit.load(file, map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(
                f"{file} is no TorchScript file ({str(error).strip().splitlines()[0]}); valid: {INCEPTION_URL}. "
                "pt_inception-2015-12-05-6726825d.pth and its like hold weights only"
            ) from error
        self.sha256 = sha256_of(file)
        self.transform = "rounded to 8 bits; the network resizes them to 299 x 299 pixels and normalises them itself"

    def to(self, device: torch.device) -> None:
        self._network = self._network.to(device)

    def features(self, images: Tensor) -> Any:
        return self._network(to_uint8(images), return_features=True)


class Dinov2Features(FeatureExtractor):
    """The class token of a DINOv2 after its last norm.

    Args:
        path: a folder or a name on the hub, such as `facebook/dinov2-large`; only safetensors are read.
        image_size: side to which images are resized, bicubic with antialiasing; a multiple of the patch size.

    Raises:
        MissingWeightsError: they cannot be loaded, or transformers is not installed.
        ValueError: the patches do not divide `image_size`.
    """

    def __init__(self, *, path: str, image_size: int) -> None:
        from flextok.training.repa import IMAGENET_MEAN, IMAGENET_STD, FrozenTeacher

        try:
            teacher = FrozenTeacher.load(path, field="evaluation.features.<name>.path")
        except (ImportError, ValueError) as error:
            raise MissingWeightsError(f"{error}; put such a folder at {path}") from error
        if image_size < 1 or image_size % teacher.patch_size:
            raise ValueError(
                f"evaluation.features.<name>.image_size={image_size}: valid is a multiple of {teacher.patch_size}, "
                f"the patch size of {path}"
            )
        # Weights may be stored in half precision.
        self._network = teacher.model.float()
        self._size = image_size
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        settings = {key: value for key, value in self._network.config.to_dict().items() if key not in _NOT_SETTINGS}
        # Weights do not tell the number of heads.
        self.sha256 = sha256_of_module(self._network, json.dumps(settings, sort_keys=True, default=str))
        self.transform = (
            f"clamped to [-1, 1], resized to {image_size} x {image_size} pixels (bicubic, antialiased) if they have "
            "another size, normalised with mean and deviation of ImageNet's colours"
        )

    def to(self, device: torch.device) -> None:
        self._network.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def features(self, images: Tensor) -> Any:
        size = (self._size, self._size)
        resized = images.float().clamp(-1, 1)
        if tuple(images.shape[-2:]) != size:
            resized = F.interpolate(resized, size, mode="bicubic", antialias=True).clamp(-1, 1)
        normalised = (resized / 2 + 0.5 - self._mean) / self._std
        return self._network(pixel_values=normalised).last_hidden_state[:, 0]


class ModuleFeatures(FeatureExtractor):
    """Any network from images `[B, 3, H, W]` in [-1, 1] to `[B, D]`, in eval mode."""

    def __init__(self, module: nn.Module) -> None:
        self._network = module.eval()
        self.sha256 = sha256_of_module(module)
        self.transform = "clamped to [-1, 1]; the rest is up to the network"

    def to(self, device: torch.device) -> None:
        self._network.to(device)

    def features(self, images: Tensor) -> Any:
        return self._network(images.float().clamp(-1, 1))


def as_extractor(built: Any, *, field: str) -> FeatureExtractor:
    """What a config built as an extractor; `field` is where. Raises ValueError for what is neither one nor a module."""
    if isinstance(built, FeatureExtractor):
        return built
    if isinstance(built, nn.Module):
        return ModuleFeatures(built)
    raise ValueError(f"{field} builds a {type(built).__name__}; valid: a torch module from images to features [B, D]")


def sha256_of_module(module: nn.Module, settings: str = "") -> str:
    """Of its class, its settings, and all weights and buffers in its state."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return hashlib.sha256(f"{name} {settings} {weights_sha256(module)}".encode()).hexdigest()
