"""Images to tokens and back for whatever judges a model: what is drawn belongs to an image, not to its batch.

Evaluation, validation and the pictures of training share it, so they show the same reconstructions. The model has
to be in eval mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flextok.flextok_wrapper import FlexTok
from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.seeding import image_generators


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A batch after the encoder: per image `[1, L]` ids, `[1, L, d]` quants and `[1, C, h, w]` latents."""

    keys: list[str]
    tokens: list[Tensor]
    quants: list[Tensor]
    latents: list[Tensor]


def encode_images(model: FlexTok, images: Tensor, keys: Sequence[str], *, seed: int) -> Encoded:
    """Tokens of `[B, 3, H, W]` images; `keys` name them."""
    return encode_inputs(model, {model.vae.images_read_key: list(images.split(1))}, keys, seed=seed)


def encode_inputs(model: FlexTok, inputs: DataDict, keys: Sequence[str], *, seed: int) -> Encoded:
    """Tokens of a batch whose images, or latents in place of them, are in a data dictionary; `keys` name them."""
    data = model.encode({**inputs, RNG_KEY: image_generators(seed, keys, stream="encode")})
    return Encoded(
        keys=list(keys),
        tokens=list(data[model.token_write_key]),
        quants=list(data[model.quants_write_key]),
        latents=list(data[model.vae.vae_latents_write_key]),
    )


def decode_tokens(
    model: FlexTok, encoded: Encoded, *, keep_k: int | Sequence[int], seed: int, **decode_options: Any
) -> Tensor:
    """Images `[B, 3, H, W]` from the first `keep_k` tokens, of all or of each; the noise is one for every number.

    `decode_options` are those of `FlexTok.decode`, such as `timesteps` and `guidance_scale`.
    """
    data: DataDict = {
        model.quants_write_key: list(encoded.quants),
        model.eval_keep_k_key: [keep_k] * len(encoded.keys) if isinstance(keep_k, int) else list(keep_k),
        RNG_KEY: image_generators(seed, encoded.keys, stream="decode"),
    }
    sizes = [(latent.shape[-2], latent.shape[-1]) for latent in encoded.latents]
    data = model.decode(data, vae_image_sizes=sizes, verbose=False, **decode_options)
    return torch.cat(list(data[model.image_write_key]))


def decode_latents(model: FlexTok, encoded: Encoded) -> Tensor:
    """Images `[B, 3, H, W]` from the unquantised latents: what the tokenizer could reach at best."""
    data = model.vae.decode({model.vae.vae_latents_read_key: list(encoded.latents)})
    return torch.cat(list(data[model.vae.images_reconst_write_key]))
