"""A tokenizer as evaluation needs it: images to tokens and back. All handling of dictionary keys is here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flextok.evaluation.settings import EvaluationSettings
from flextok.seeding import image_generator


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A batch after the encoder: per image `[1, L]` ids, `[1, L, d]` quants and `[1, C, h, w]` latents."""

    keys: list[str]
    tokens: list[Tensor]
    quants: list[Tensor]
    latents: list[Tensor]


class Codec:
    """Encodes and decodes batches with randomness that belongs to each image, not to the batch it is in."""

    def __init__(self, model: Any, settings: EvaluationSettings) -> None:
        self._model = model
        self._settings = settings

    def encode(self, images: Tensor, keys: Sequence[str]) -> Encoded:
        """Tokens of `[B, 3, H, W]` images; `keys` name them."""
        model = self._model
        data = {model.vae.images_read_key: list(images.split(1)), "rng": self._generators(keys, "encode")}
        data = model.encode(data)
        return Encoded(
            keys=list(keys),
            tokens=list(data[model.token_write_key]),
            quants=list(data[model.quants_write_key]),
            latents=list(data[model.vae.vae_latents_write_key]),
        )

    def decode(self, encoded: Encoded, *, keep_k: int) -> Tensor:
        """Images `[B, 3, H, W]` from the first `keep_k` tokens; the same start noise for every `keep_k`."""
        model, settings = self._model, self._settings
        data = {
            model.quants_write_key: list(encoded.quants),
            model.eval_keep_k_key: [keep_k] * len(encoded.keys),
            "rng": self._generators(encoded.keys, "decode"),
        }
        data = model.decode(
            data,
            timesteps=settings.steps,
            guidance_scale=settings.guidance_scale,
            perform_norm_guidance=settings.perform_norm_guidance,
            vae_image_sizes=[(latent.shape[-2], latent.shape[-1]) for latent in encoded.latents],
            verbose=False,
        )
        return torch.cat(list(data[model.image_write_key]))

    def reconstruct_with_vae(self, encoded: Encoded) -> Tensor:
        """Images `[B, 3, H, W]` from the unquantised latents: what the tokenizer could reach at best."""
        vae = self._model.vae
        data = vae.decode({vae.vae_latents_read_key: list(encoded.latents)})
        return torch.cat(list(data[vae.images_reconst_write_key]))

    def _generators(self, keys: Sequence[str], stream: str) -> list[torch.Generator]:
        return [image_generator(self._settings.seed, key, stream=stream) for key in keys]
