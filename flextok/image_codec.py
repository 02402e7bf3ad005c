"""The interface of everything that turns images into latents and back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList


class ImageCodec(nn.Module, ABC):
    """What every VAE shares: its keys, batching of lists, and skipping of latents that are already there."""

    downsample_factor: int
    in_memory = True
    """Whether its weights, if it has any, are part of the model; see `loaded`."""

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

    @abstractmethod
    def _encode(self, images: Tensor, data_dict: DataDict) -> Tensor:
        """Images `[batch, 3, H, W]` to scaled latents `[batch, c, h, w]`."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """The way back."""

    def loaded(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, encoding and decoding read no weights from disk. Here nothing has to be done for it."""
        return nullcontext()

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
