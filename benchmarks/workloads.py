"""What is measured: models of the named sizes with random weights, and the inputs of their steps."""

import zlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import hydra
import torch
from torch import Tensor

from flextok.config import compose
from flextok.flextok_wrapper import FlexTok
from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.utils.export import official_config

Form = Literal["mask_token", "attention_mask", "packed"]
FORMS: tuple[Form, ...] = get_args(Form)
CHANNELS = 16
NOISE_KEY = "given_noise"

# The VAE lends its keys and never runs; latents are 8 times smaller than images, as in the released models.
_OFFICIAL = (
    *("vae=pixel", "latent.channels=16", "latent.downsample=8", "model.vae.latent_channels=3"),
    *("+model.vae.force_vae_encode=false", "data=image_folder", "data.root=none", "size.act_checkpoint=false"),
)


@dataclass(frozen=True)
class Workload:
    """A size of model and how many samples it works on at once."""

    overrides: tuple[str, ...]
    latent_size: int
    """Latents along one side; they have 16 channels."""
    batch: int

    def num_patches(self, model: FlexTok) -> int:
        """Patches of one sample."""
        return (self.latent_size // model.encoder.module_dict["enc_patch_emb"].patch_sizes[0]) ** 2

    def config(self, form: Form) -> Any:
        # Times as published: the shift that pixel latents want is no part of the measured models.
        shift = "model.flow_matching_noise_module.timestep_shift=1.0"
        return compose([*self.overrides, f"dropout={form}", shift, "paths.run=none"])


WORKLOADS = {
    "bench": Workload(("model=bench", "vae=pixel"), latent_size=16, batch=16),
    "flextok_d12_d12": Workload(("model=flextok_d12_d12", *_OFFICIAL), latent_size=32, batch=64),
    "flextok_d18_d18": Workload(("model=flextok_d18_d18", *_OFFICIAL), latent_size=32, batch=32),
    "flextok_d18_d28": Workload(("model=flextok_d18_d28", *_OFFICIAL), latent_size=32, batch=32),
}


@dataclass(frozen=True)
class Step:
    """Everything random in one training step, so that all implementations do the same work."""

    seed: int
    latents: Tensor
    """`[batch, channels, h, w]`."""
    noise: Tensor
    times: Tensor
    """`[batch]`, 1 is noise."""
    keep_ks: list[int]
    null: list[bool]
    """Which samples train the null condition."""

    def data(self, model: FlexTok) -> DataDict:
        """The data dictionary that makes `model` draw the times, `keep_ks` and null conditions of this step."""
        return {
            model.vae.vae_latents_write_key: list(self.latents.split(1)),
            NOISE_KEY: list(self.noise.split(1)),
            RNG_KEY: torch.Generator().manual_seed(self.seed),
        }


def build_model(workload: Workload, form: Form, device: torch.device, *, exported: bool = False) -> FlexTok:
    """A model in training mode that reads its noise from the data dictionary.

    With `exported` it is built of the published fields alone, as a checkpoint in the official format is.

    Every form of one workload gets the same weights, none of them zero: freshly initialised heads would answer 0 to
    anything, and a comparison of answers would prove nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = workload.config(form).model
        config = official_config(config) if exported else config
        model: FlexTok = hydra.utils.instantiate(config, _convert_="all")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # By name: the learned mask token, which two forms lack, must not shift the draws of the others.
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            std = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    model.flow_matching_noise_module.noise_read_key = NOISE_KEY
    model.pipeline.noise_read_key = NOISE_KEY
    return model.to(device).train()


@torch.no_grad()
def draw_step(model: FlexTok, workload: Workload, *, batch: int, seed: int, device: torch.device) -> Step:
    """The inputs of a training step, and what `model` draws in it: its modules that draw are run alone, in order."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, CHANNELS, workload.latent_size, workload.latent_size)
    latents, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    step = Step(seed, latents, noise, torch.empty(0), [], [])
    sampler, noising = model.encoder.module_dict["enc_dropout_sampler"], model.flow_matching_noise_module
    registers = list(torch.zeros(batch, model.num_registers, 1, device=device).split(1))
    data = noising(sampler(step.data(model) | {sampler.read_key: registers}))
    keep_ks, null = data[sampler.sampled_keep_k_write_key], data[sampler.sampled_null_write_key]
    return Step(seed, latents, noise, data[noising.timesteps_write_key], keep_ks, null)


def draw_decoding(workload: Workload, *, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Quants `[batch, registers, levels]` and the noise `[batch, channels, h, w]` to start from."""
    size = workload.config("mask_token").size
    generator = torch.Generator().manual_seed(0)
    quants = torch.rand((batch, size.registers, len(size.levels)), generator=generator) * 2 - 1
    noise = torch.randn((batch, CHANNELS, workload.latent_size, workload.latent_size), generator=generator)
    return quants.to(device), noise.to(device)
