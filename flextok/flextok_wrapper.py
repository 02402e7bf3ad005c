"""FlexTok: images to ordered tokens and back (arXiv 2502.13967)."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from flextok.flow_matching.sampling import GuidanceScale
from flextok.model.data_dict import DataDict, Generators
from flextok.model.preprocessors.dropout_sampler import DropoutSampler
from flextok.utils.checkpoint import check_file_fits, instantiate_parts, load_safetensors, sanitize_hydra_config
from flextok.utils.export import export_model
from flextok.utils.model_card import model_card

logger = logging.getLogger(__name__)


class FlexTok(nn.Module):
    """A VAE, an encoder to registers, a quantizer, and a rectified-flow decoder, each working on a data dictionary.

    Args:
        pipeline: called as `pipeline(model=decoder)`; the sampler it returns is no module, so that the decoder is
            registered once.
    """

    def __init__(
        self,
        vae: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        regularizer: nn.Module,
        flow_matching_noise_module: nn.Module,
        pipeline: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.vae: Any = vae
        self.encoder: Any = encoder
        self.decoder: Any = decoder
        self.regularizer: Any = regularizer
        self.flow_matching_noise_module: Any = flow_matching_noise_module
        self.pipeline = pipeline(model=self.decoder)
        self.token_write_key: Any = self.regularizer.tokens_write_key
        self.quants_write_key: Any = self.regularizer.quants_write_key
        self.image_write_key: Any = self.vae.images_reconst_write_key

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along each side."""
        return self.vae.downsample_factor

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    @property
    def num_registers(self) -> int:
        """Tokens of an image at full length."""
        return self.encoder.module_dict["enc_register_module"].n_max

    @property
    def eval_keep_k_key(self) -> str:
        """Key under which the decoder looks for `keep_k` in evaluation."""
        return self.decoder.module_dict["dec_nested_dropout"].eval_keep_k_read_key

    def init_weights_muP(self) -> None:
        """Re-initialise encoder and decoder with the muP rules; needs `flextok.model.init.set_base_shapes` before."""
        self.encoder.init_weights_muP()
        self.decoder.init_weights_muP()

    def encode(self, data_dict: DataDict) -> DataDict:
        """Images (or latents, where the VAE is told to keep them) to quants and tokens; gradients except in the VAE."""
        with torch.no_grad():
            data_dict = self.vae.encode(data_dict)
        return self.regularizer(self.encoder(data_dict))

    def decode(
        self,
        data_dict: DataDict,
        timesteps: int | None = None,
        generator: Generators = None,
        vae_image_sizes: int | Sequence[Sequence[int]] | None = None,
        verbose: bool = True,
        guidance_scale: GuidanceScale = 1.0,
        perform_norm_guidance: bool = False,
        *,
        sampler: str = "euler",
        timestep_shift: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_every: int = 1,
        **ignored: Any,
    ) -> DataDict:
        """Quants to images; options as in `MinRFPipeline.__call__`, others are ignored with a warning."""
        if ignored:
            logger.warning("decode ignores %s", ", ".join(sorted(ignored)))
        data_dict = self.pipeline(
            data_dict,
            generator=generator,
            timesteps=timesteps,
            vae_image_sizes=vae_image_sizes,
            verbose=verbose,
            guidance_scale=guidance_scale,
            perform_norm_guidance=perform_norm_guidance,
            sampler=sampler,
            timestep_shift=timestep_shift,
            guidance_interval=guidance_interval,
            guidance_every=guidance_every,
        )
        with torch.no_grad():
            return self.vae.decode(data_dict)

    def autoencode(self, data_dict: DataDict, **decode_options: Any) -> DataDict:
        """Encode, then decode with the options of `decode`; latents of the input's size unless told otherwise."""
        data_dict = self.encode(data_dict)
        if decode_options.get("vae_image_sizes") is None and self.pipeline.target_sizes_read_key is None:
            latents = data_dict[self.vae.vae_latents_write_key]
            decode_options["vae_image_sizes"] = [tuple(sample.shape[-2:]) for sample in latents]
        return self.decode(data_dict, **decode_options)

    def forward(self, data_dict: DataDict) -> DataDict:
        """One training forward: encode, noise the latents, predict the velocity; no loss."""
        return self.decoder(self.flow_matching_noise_module(self.encode(data_dict)))

    def tokenize(self, images: Tensor) -> list[Tensor]:
        """Images `[batch, channels, height, width]` in [-1, 1] to ids, one `[1, tokens]` int64 per image.

        Raises:
            ValueError: the model is in training mode, and its encoder then leaves out what the decoder will drop.
        """
        if self.training and any(isinstance(module, DropoutSampler) for module in self.encoder.modules()):
            raise ValueError("tokenize in training mode would lack the tokens past keep_k: call model.eval() first")
        data_dict = self.encode({self.vae.images_read_key: images.split(1)})
        return list(data_dict[self.token_write_key])

    def detokenize(
        self,
        token_ids_list: Sequence[Tensor],
        vae_image_sizes: int | Sequence[Sequence[int]] = 32,
        **decode_options: Any,
    ) -> Tensor:
        """Ids `[1, l]`, of any length l up to the number of registers per image, to images `[batch, 3, height, width]`.

        `vae_image_sizes` is the size of the latents; all images must come out in one size.

        Raises:
            ValueError: an entry has more ids than the model has registers, or another shape than `[1, l]`.
        """
        if len(token_ids_list) == 0:
            raise ValueError("token_ids_list is empty; give at least one tensor of ids [1, l]")
        padded = []
        for index, ids in enumerate(token_ids_list):
            if ids.ndim != 2 or ids.shape[0] != 1 or not 1 <= ids.shape[1] <= self.num_registers:
                raise ValueError(
                    f"token_ids_list[{index}] has shape {tuple(ids.shape)}; "
                    f"valid: [1, l] with l in 1..{self.num_registers}"
                )
            if ids.min() < 0 or ids.max() >= self.regularizer.codebook_size:
                raise ValueError(
                    f"token_ids_list[{index}] has ids from {ids.min()} to {ids.max()}; "
                    f"valid: 0 to {self.regularizer.codebook_size - 1}"
                )
            padded.append(F.pad(ids, (0, self.num_registers - ids.shape[1])))
        quants = self.regularizer.indices_to_embedding(torch.cat(padded).to(self.device))
        data_dict = {
            self.quants_write_key: list(quants.split(1)),
            self.eval_keep_k_key: [ids.shape[1] for ids in token_ids_list],
        }
        images = self.decode(data_dict, vae_image_sizes=vae_image_sizes, **decode_options)[self.image_write_key]
        return torch.cat(list(images))


class FlexTokFromHub(FlexTok, PyTorchModelHubMixin):
    """A FlexTok built from its config, for `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Args:
        config: the content of `config.json`. It is untrusted: only known targets are instantiated.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = sanitize_hydra_config(config)
        super().__init__(**instantiate_parts(self.config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load a folder with `config.json` and `model.safetensors`, or a model of the hub (`owner/name`).

        Raises ValueError for what is neither, for a damaged or unsafe file, and for one that does not fit its config.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_dir():
            missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
            if missing:
                raise ValueError(f"{path}: no {' and no '.join(missing)}; a model folder holds both")
            _check_config_file(path / "config.json")
        elif path.exists():
            raise ValueError(f"{path}: is a file; give its folder, or take load_model_from_safetensors for a file")
        elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(pretrained_model_name_or_path)):
            raise ValueError(f"{path}: no such folder; valid: a folder, or the name of a hub model (owner/name)")
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, config: Any = None, map_location: str = "cpu", strict: bool = True, **download: Any
    ) -> Any:
        if Path(model_id).is_dir():
            file = str(Path(model_id) / "model.safetensors")
        else:
            file = hf_hub_download(model_id, "model.safetensors", **download)
        if config is None:
            raise ValueError(f"{model_id}: no config.json")
        check_file_fits(file, config)
        return cls._load_as_safetensor(cls(config), file, map_location, strict)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise ValueError(f"{model_file}: pickled weights are not loaded; valid: model.safetensors")

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Load weights strictly whatever `strict` says: half-loaded weights would only give wrong images."""
        try:
            model.load_state_dict(load_safetensors(model_file, return_metadata=False), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{model_file}: weights and config.json disagree. {error}") from error
        return model.to(map_location).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        export_model(self, self.config, save_directory, overwrite=True)

    def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
        """The README of the model; options, which come from `model_card_kwargs`, are those of `model_card`."""
        return model_card(self, *args, **options)


def _check_config_file(file: Path) -> None:
    try:
        sanitize_hydra_config(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
