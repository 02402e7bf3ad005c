"""Images to latents and back with a diffusers `AutoencoderKL`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flextok.image_codec import ImageCodec
from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.utils.misc import get_autocast_context, str_to_dtype

logger = logging.getLogger(__name__)


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
        in_memory: False reads the weights anew inside each `loaded()` and keeps nothing of them: they are in no state
            dict, and neither `to()` nor other processes see them. For training on latents.

    Raises:
        ValueError: `in_memory=False` cannot go with the other arguments, or the folder holds no weights.
        OSError: `hf_hub_path` cannot be read.
    """

    # Registered as a module only where it stays in memory.
    vae: Any

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
        in_memory: bool = True,
    ) -> None:
        super().__init__(
            images_read_key, vae_latents_read_key, vae_latents_write_key, images_reconst_write_key, force_vae_encode
        )
        self.vae_kl_loss_write_key = vae_kl_loss_write_key
        self.dtype = str_to_dtype(dtype_override) or torch.float32
        self.sample_posterior = sample_posterior
        self.frozen = frozen
        self.hf_hub_path = hf_hub_path
        self.in_memory = in_memory
        if not in_memory:
            if hf_hub_path is None or not frozen or compile_encode_fn:
                raise ValueError(
                    f"model.vae.in_memory=False cannot go with hf_hub_path={hf_hub_path!r}, frozen={frozen}, "
                    f"compile_encode_fn={compile_encode_fn}; valid: a path, True, False"
                )
            self.vae, self._config = None, _read_architecture(hf_hub_path)
        else:
            self.vae = _default_architecture(latent_channels) if hf_hub_path is None else _load_autoencoder(hf_hub_path)
            self._config = self.vae.config
        self.scaling_factor = scaling_factor or self._config.scaling_factor
        if learnable_logvar:
            self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))
        if compile_encode_fn:
            self.vae.encoder.compile()
        if frozen:
            self.freeze()

    @property
    def downsample_factor(self) -> int:  # type: ignore[override]
        return 2 ** (len(self._config.block_out_channels) - 1)

    @property
    def latent_dim(self) -> int:
        return self._config.latent_channels

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

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[None]:
        """Inside, the network is there, on `device` if it was not in memory; then it is gone afterwards.

        Raises OSError if it cannot be read.
        """
        if self.vae is not None:
            yield
            return
        network = _load_autoencoder(str(self.hf_hub_path)).requires_grad_(False).eval().to(device)
        # Past `nn.Module`, which would register it.
        object.__setattr__(self, "vae", network)
        try:
            yield
        finally:
            object.__setattr__(self, "vae", None)

    def get_last_layer(self) -> Tensor:
        return self.vae.decoder.conv_out.weight

    def get_logvar(self) -> Tensor | None:
        return getattr(self, "logvar", None)

    def _encode(self, images: Tensor, data_dict: DataDict) -> Tensor:
        with self.loaded(images.device), get_autocast_context(images, self.dtype):
            posterior = self.vae.encode(images.to(self._weight_dtype)).latent_dist
        if self.vae_kl_loss_write_key is not None:
            data_dict[self.vae_kl_loss_write_key] = posterior.kl()
        generator = data_dict.get(RNG_KEY)
        latents = posterior.sample(generator=generator) if self.sample_posterior else posterior.mode()
        return latents * self.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.scaling_factor
        with self.loaded(latents.device), get_autocast_context(latents, self.dtype):
            return self.vae.decode(latents.to(self._weight_dtype)).sample


def _load_autoencoder(path: str) -> Any:
    from diffusers import AutoencoderKL

    try:
        # The random weights that are overwritten at once must not move torch's generator.
        with torch.random.fork_rng(devices=[]):
            return AutoencoderKL.from_pretrained(path, low_cpu_mem_usage=False)
    except OSError as error:
        raise _unreadable(path) from error


def _read_architecture(path: str) -> Any:
    """The config of a network, all defaults filled in; its weights are not read."""
    from diffusers import AutoencoderKL

    folder = Path(path).expanduser()
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ValueError(f"latent.path={path!r} has no weights; valid: a folder with those of an AutoencoderKL")
    try:
        with torch.device("meta"):
            network = AutoencoderKL.from_config(AutoencoderKL.load_config(path))
    except OSError as error:
        raise _unreadable(path) from error
    num_parameters = f"{sum(parameter.numel() for parameter in network.parameters()):,}"
    logger.info("the VAE's %s parameters are not in memory; they are read when pictures are drawn", num_parameters)
    return network.config


def _unreadable(path: str) -> OSError:
    return OSError(
        f"hf_hub_path={path!r} is neither a local folder with an AutoencoderKL (config.json and weights) nor a "
        f"reachable hub model; to work offline give a local folder"
    )
