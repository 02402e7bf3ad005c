"""Images to latents and back with a diffusers `AutoencoderKL`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.model.packed_list import PackedList
from flextok.utils.misc import get_autocast_context, str_to_dtype


class ImageCodec(nn.Module):
    """What every VAE shares: its keys, batching of lists, and skipping of latents that are already there.

    Subclasses define `_encode` and `_decode` on batches `[batch, channels, height, width]`.
    """

    downsample_factor: int

    def __init__(
        self,
        images_read_key: str,
        vae_latents_read_key: str,
        vae_latents_write_key: str,
        images_reconst_write_key: str,
        force_vae_encode: bool,
    ) -> None:
        super().__init__()
        self.images_read_key = images_read_key
        self.vae_latents_read_key = vae_latents_read_key
        self.vae_latents_write_key = vae_latents_write_key
        self.images_reconst_write_key = images_reconst_write_key
        self.force_vae_encode = force_vae_encode

    def _encode(self, images: Tensor, data_dict: DataDict) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def init_weights_muP(self) -> None:
        """Nothing to do: the VAE is pretrained."""

    def encode(self, data_dict: DataDict) -> DataDict:
        """Images `[1, 3, H, W]` in [-1, 1] -> scaled latents `[1, c, h, w]`.

        Raises:
            ValueError: the images of the batch differ in size.
        """
        if not self.force_vae_encode and self.vae_latents_write_key in data_dict:
            return data_dict
        images = _one_size(data_dict[self.images_read_key], self.images_read_key)
        data_dict[self.vae_latents_write_key] = PackedList(self._encode(images, data_dict))
        return data_dict

    def decode(self, data_dict: DataDict) -> DataDict:
        """Scaled latents -> images; samples of several sizes are decoded one by one."""
        latents = PackedList.pack_if_uniform(data_dict[self.vae_latents_read_key])
        if isinstance(latents, PackedList):
            data_dict[self.images_reconst_write_key] = PackedList(self._decode(latents.tensor))
        else:
            data_dict[self.images_reconst_write_key] = [self._decode(sample) for sample in latents]
        return data_dict

    def autoencode(self, data_dict: DataDict) -> DataDict:
        """Encode, then decode what was encoded."""
        data_dict = self.encode(data_dict)
        data_dict[self.vae_latents_read_key] = data_dict[self.vae_latents_write_key]
        return self.decode(data_dict)

    def forward(self, data_dict: DataDict) -> DataDict:
        return self.autoencode(data_dict)


def _one_size(images: Sequence[Tensor], key: str) -> Tensor:
    packed = PackedList.pack_if_uniform(images)
    if not isinstance(packed, PackedList):
        raise ValueError(f"{key!r}: images of one batch must have one size, got {[tuple(i.shape) for i in images]}")
    return packed.tensor


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
            self.vae.encode = torch.compile(self.vae.encode)
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
            posterior = self.vae.encode(images.float() if self.dtype == torch.float32 else images).latent_dist
        if self.vae_kl_loss_write_key is not None:
            data_dict[self.vae_kl_loss_write_key] = posterior.kl()
        generator = data_dict.get(RNG_KEY)
        latents = posterior.sample(generator=generator) if self.sample_posterior else posterior.mode()
        return latents * self.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.scaling_factor
        with get_autocast_context(latents, self.dtype):
            return self.vae.decode(latents.float() if self.dtype == torch.float32 else latents).sample


def _load_autoencoder(path: str) -> Any:
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(path, low_cpu_mem_usage=False)
    except OSError as error:
        raise OSError(
            f"hf_hub_path={path!r} is neither a local folder with an AutoencoderKL (config.json and weights) nor a "
            f"reachable hub model; to work offline give a local folder"
        ) from error
