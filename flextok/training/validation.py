"""The flow loss at fixed noise, fixed times and a fixed number of tokens: what can be compared between runs.

The training loss cannot: it averages over whatever `keep_k`, noise and times a step happened to draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok.flextok_wrapper import FlexTok
from flextok.flow_matching.path import interpolate
from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList
from flextok.reconstruct import Encoded, encode_inputs
from flextok.seeding import image_generators
from flextok.training.objective import velocity_errors
from flextok.training.repa import FEATURES_KEY


def flow_losses(model: FlexTok, encoded: Encoded, *, keep_ks: Sequence[int], num_sigmas: int, seed: int) -> Tensor:
    """Flow loss `[len(keep_ks), batch]` of a model in eval mode.

    Each image meets `num_sigmas` noise levels, one drawn in each of as many equal parts of [0, 1].
    """
    clean = encoded.latents
    device = clean[0].device
    generators = image_generators(seed, encoded.keys, stream="flow_loss")
    losses = torch.zeros(len(keep_ks), len(clean), device=device)
    for part in range(num_sigmas):
        noise, positions = _draw(clean, generators)
        sigmas = (part + positions.to(device)) / num_sigmas
        triples = zip(clean, noise, sigmas.split(1), strict=True)
        noised = PackedList.pack([interpolate(c, n, sigma) for c, n, sigma in triples])
        for row, keep_k in enumerate(keep_ks):
            predicted = _decode_once(model, encoded, noised, sigmas, keep_k)
            losses[row] += velocity_errors(model, predicted, noise) / num_sigmas
    return losses


def encode_batch(model: FlexTok, batch: Mapping[str, Any], *, seed: int) -> Encoded:
    """Tokens of a batch of a data module, whether it holds images or latents.

    Raises:
        ValueError: see `model_inputs`.
    """
    return encode_inputs(model, model_inputs(model, batch), batch["key"], seed=seed)


def model_inputs(model: FlexTok, batch: Mapping[str, Any]) -> DataDict:
    """The dictionary a model starts from: the images of a batch, or its latents in place of them.

    Features of a teacher that come with the latents are in it too, under `FEATURES_KEY`.

    Raises:
        ValueError: The batch holds latents, and the model would encode images all the same.
    """
    if "image" in batch:
        return {model.vae.images_read_key: batch["image"].split(1)}
    if model.vae.force_vae_encode:
        raise ValueError(
            "model.vae.force_vae_encode=true: the VAE would encode images, but the data are latents; "
            "valid: false, which data=latents sets"
        )
    inputs: DataDict = {model.vae.vae_latents_write_key: batch["latents"].split(1)}
    if "features" in batch:
        inputs[FEATURES_KEY] = batch["features"].split(1)
    return inputs


def _draw(clean: Sequence[Tensor], generators: list[torch.Generator]) -> tuple[list[Tensor], Tensor]:
    noise = [
        torch.randn(entry.shape, generator=generator).to(entry.device, entry.dtype)
        for entry, generator in zip(clean, generators, strict=True)
    ]
    return noise, torch.cat([torch.rand(1, generator=generator) for generator in generators])


def _decode_once(model: FlexTok, encoded: Encoded, noised: PackedList, sigmas: Tensor, keep_k: int) -> DataDict:
    noise_module = model.flow_matching_noise_module
    return model.decoder(
        {
            model.quants_write_key: encoded.quants,
            noise_module.clean_images_read_key: encoded.latents,
            noise_module.noised_images_write_key: noised,
            noise_module.timesteps_write_key: sigmas,
            model.eval_keep_k_key: [keep_k] * len(noised),
        }
    )
