"""What the demo computes: an image is encoded once by each model, and decoded for each number of tokens asked for."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from threading import Lock

import torch
from PIL import Image
from torch import Tensor

from flextok.data.transforms import resize_shorter_center_crop, to_tensor, to_uint8
from flextok.evaluation.reconstruction import psnr, to_unit_range
from flextok.flextok_wrapper import FlexTok
from flextok.reconstruct import Encoded, decode_tokens, encode_images

MAX_STEPS = 100
MAX_GUIDANCE = 15.0


@dataclass(frozen=True)
class DemoModel:
    """A model on its device in eval mode, what it is called, and the side in pixels of the squares it reads."""

    name: str
    model: FlexTok
    image_size: int

    @property
    def num_tokens(self) -> int:
        return self.model.num_registers

    @property
    def bits_per_token(self) -> float:
        return math.log2(self.model.regularizer.codebook_size)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the decoder samples; the names are those of `FlexTok.decode`. ValueError for what would take for ever."""

    timesteps: int
    guidance_scale: float
    perform_norm_guidance: bool

    def __post_init__(self) -> None:
        if not 1 <= self.timesteps <= MAX_STEPS:
            raise ValueError(f"steps is {self.timesteps}: valid are 1 to {MAX_STEPS}")
        if not 1.0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise ValueError(f"guidance is {self.guidance_scale}: valid are 1 (none) to {MAX_GUIDANCE:g}")


# Compared by identity: Gradio hashes what a visitor's session holds.
@dataclass(frozen=True, eq=False)
class Reading:
    """An image as one model reads it: the square `[1, 3, size, size]` in [-1, 1], and its tokens."""

    model: DemoModel
    square: Tensor
    encoded: Encoded
    digest: str

    @property
    def token_ids(self) -> list[int]:
        return self.encoded.tokens[0].flatten().tolist()


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What `keep_k` tokens decode to: `[3, size, size]` of uint8, and its PSNR in dB."""

    keep_k: int
    image: Tensor
    psnr: float


class Workbench:
    """Models side by side; one computation at a time, whatever the number of visitors.

    Args:
        seed: for what is drawn for an image; with its name it decides the noise, as in `flextok reconstruct`.
        max_remembered: how many reconstructions are kept for a slider that comes back to them.
    """

    def __init__(self, models: Sequence[DemoModel], *, seed: int, max_remembered: int) -> None:
        if not models:
            raise ValueError("no model is given")
        self.models = list(models)
        self.seed = seed
        self.max_remembered = max_remembered
        self._remembered: OrderedDict[tuple[object, ...], Reconstruction] = OrderedDict()
        self._lock = Lock()

    @property
    def max_tokens(self) -> int:
        """Tokens of the model that has most."""
        return max(model.num_tokens for model in self.models)

    def read(self, picture: Image.Image, name: str) -> tuple[Reading, ...]:
        """The central square of an RGB image, resized and encoded by each model."""
        with self._lock, torch.no_grad():
            return tuple(self._read(model, picture, name) for model in self.models)

    def reconstruct(self, reading: Reading, keep_ks: Sequence[int], sampling: Sampling) -> list[Reconstruction]:
        """Reconstructions from the first `keep_ks` tokens; those not remembered are decoded in one batch."""
        keys = [(id(reading.model), reading.digest, keep_k, sampling) for keep_k in keep_ks]
        with self._lock:
            found = {key: self._remembered[key] for key in keys if key in self._remembered}
            missing = [key for key in dict.fromkeys(keys) if key not in found]
            if missing:
                numbers = [key[2] for key in missing]
                found |= dict(zip(missing, self._decode(reading, numbers, sampling), strict=True))
            for key in keys:
                self._remembered[key] = found[key]
                self._remembered.move_to_end(key)
            while len(self._remembered) > self.max_remembered:
                self._remembered.popitem(last=False)
        return [found[key] for key in keys]

    def _read(self, model: DemoModel, picture: Image.Image, name: str) -> Reading:
        pixels = resize_shorter_center_crop(picture, model.image_size)
        square = to_tensor(pixels)[None]
        encoded = encode_images(model.model, square.to(model.model.device), [name], seed=self.seed)
        digest = sha256(name.encode("utf-8", "replace") + b"\0" + pixels.tobytes()).hexdigest()
        return Reading(model, square, encoded, digest)

    def _decode(self, reading: Reading, keep_ks: list[int], sampling: Sampling) -> list[Reconstruction]:
        count, one = len(keep_ks), reading.encoded
        same = Encoded(
            keys=one.keys * count, tokens=one.tokens * count, quants=one.quants * count, latents=one.latents * count
        )
        options = asdict(sampling)
        with torch.no_grad():
            images = decode_tokens(reading.model.model, same, keep_k=keep_ks, seed=self.seed, **options).cpu()
        qualities = psnr(to_unit_range(images), to_unit_range(reading.square))
        return [
            Reconstruction(keep_k, image, quality)
            for keep_k, image, quality in zip(keep_ks, to_uint8(images), qualities, strict=True)
        ]
