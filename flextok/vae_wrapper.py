"""Images to latents and back with a diffusers `AutoencoderKL`."""

from typing import Any

import torch
from torch import Tensor, nn

from flextok.image_codec import ImageCodec
from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.utils.misc import get_autocast_context, str_to_dtype


def _default_architecture(latent_channels: int) -> Any:
    """The network of `hf_hub_path=None`: four levels of 128, 256, 512, 512 channels, factor 8."""
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=2,
        act_fn="silu",
        latent_channels=latent_channels,
        norm_num_groups=32,
        sample_size=1024,
    )


class StableDiffusionVAE(ImageCodec):
    """A diffusers `AutoencoderKL`; latents are multiplied by `scaling_factor`, nothing is added.

    Args:
        latent_channels: used only without `hf_hub_path`.
        scaling_factor: None or 0 takes the network's own.
        dtype_override: autocast dtype around the network; None means fp32.
        hf_hub_path: hub name or local folder of an `AutoencoderKL`; None builds the default network untrained.
        sample_posterior: False takes the mode of the posterior.
        force_vae_encode: False keeps latents that are already in the dictionary.
        frozen: no gradients, and evaluation mode whatever `train()` is asked.
    """

    def __init__(
        self,
        images_read_key: str,
        vae_latents_read_key: str,
        vae_latents_write_key: str,
        images_reconst_write_key: str,
        vae_kl_loss_write_key: str | None = None,
        latent_channels: int = 16,
        scaling_factor: float | None = None,
        dtype_override: str | None = "fp32",
        hf_hub_path: str | None = None,
        sample_posterior: bool = True,
        learnable_logvar: bool = False,
        logvar_init: float = 0.0,
        compile_encode_fn: bool = False,
        force_vae_encode: bool = True,
        frozen: bool = False,
    ) -> None:
        super().__init__(
            images_read_key, vae_latents_read_key, vae_latents_write_key, images_reconst_write_key, force_vae_encode
        )
        self.vae_kl_loss_write_key = vae_kl_loss_write_key
        self.dtype = str_to_dtype(dtype_override) or torch.float32
        self.sample_posterior = sample_posterior
        self.frozen = frozen
        if hf_hub_path is None:
            self.vae = _default_architecture(latent_channels)
        else:
            self.vae = _load_autoencoder(hf_hub_path)
        self.scaling_factor = scaling_factor or self.vae.config.scaling_factor
        if learnable_logvar:
            self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))
        if compile_encode_fn:
            self.vae.encoder.compile()
        if frozen:
            self.freeze()

    @property
    def downsample_factor(self) -> int:  # type: ignore[override]
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_dim(self) -> int:
        return self.vae.config.latent_channels

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @property
    def _weight_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @property
    def device_type(self) -> str:
        return self.device.type

    def freeze(self) -> None:
        """Turn gradients off and stay in evaluation mode from now on."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "StableDiffusionVAE":
        return super().train(mode and not self.frozen)

    def get_last_layer(self) -> Tensor:
        return self.vae.decoder.conv_out.weight

    def get_logvar(self) -> Tensor | None:
        return getattr(self, "logvar", None)

    def _encode(self, images: Tensor, data_dict: DataDict) -> Tensor:
        with get_autocast_context(images, self.dtype):
            posterior = self.vae.encode(images.to(self._weight_dtype)).latent_dist
        if self.vae_kl_loss_write_key is not None:
            data_dict[self.vae_kl_loss_write_key] = posterior.kl()
        generator = data_dict.get(RNG_KEY)
        latents = posterior.sample(generator=generator) if self.sample_posterior else posterior.mode()
        return latents * self.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.scaling_factor
        with get_autocast_context(latents, self.dtype):
            return self.vae.decode(latents.to(self._weight_dtype)).sample


def _load_autoencoder(path: str) -> Any:
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(path, low_cpu_mem_usage=False)
    except OSError as error:
        raise OSError(
            f"hf_hub_path={path!r} is neither a local folder with an AutoencoderKL (config.json and weights) nor a "
            f"reachable hub model; to work offline give a local folder"
        ) from error
