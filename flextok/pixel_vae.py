"""Latents that are the pixels themselves: trains without any download."""

import torch
from torch import Tensor

from flextok.image_codec import ImageCodec
from flextok.model.data_dict import DataDict


class PixelVAE(ImageCodec):
    """Normalise pixels to latents and back; the same interface as `StableDiffusionVAE`, factor 1, no parameters.

    `latent_channels=1` averages the colours (grey data); latents are `(pixel - mean) / std` with pixels in [-1, 1].
    """

    downsample_factor = 1
    _reference: Tensor

    def __init__(
        self,
        images_read_key: str,
        vae_latents_read_key: str,
        vae_latents_write_key: str,
        images_reconst_write_key: str,
        latent_channels: int,
        mean: float,
        std: float,
        force_vae_encode: bool = True,
    ) -> None:
        super().__init__(
            images_read_key, vae_latents_read_key, vae_latents_write_key, images_reconst_write_key, force_vae_encode
        )
        if latent_channels not in (1, 3):
            raise ValueError(f"latent_channels={latent_channels}: pixels have 3 channels, or 1 for grey images")
        if std <= 0:
            raise ValueError(f"std={std} must be positive")
        self.latent_dim = latent_channels
        self.mean, self.std = mean, std
        # Follows `.to()`, so that `device` is known without parameters.
        self.register_buffer("_reference", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._reference.device

    @property
    def device_type(self) -> str:
        return self.device.type

    def freeze(self) -> None:
        """Nothing to do: there are no parameters."""

    def _encode(self, images: Tensor, data_dict: DataDict) -> Tensor:
        pixels = images.mean(1, keepdim=True) if self.latent_dim == 1 else images
        return (pixels - self.mean) / self.std

    def _decode(self, latents: Tensor) -> Tensor:
        pixels = latents * self.std + self.mean
        return pixels.expand(-1, 3, -1, -1) if self.latent_dim == 1 else pixels

    def extra_repr(self) -> str:
        return f"latent_channels={self.latent_dim}, mean={self.mean}, std={self.std}"
