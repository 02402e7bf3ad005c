"""Reconstructions of a few validation images at several numbers of tokens, drawn at each validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from flextok.flextok_wrapper import FlexTok
from flextok.training.randomness import image_generators
from flextok.training.validation import default_keep_ks, image_data
from flextok.utils.checkpoint import atomic_path

MIN_SIZE = 64  # Smaller images are enlarged by a whole factor, so that one sees the pixels and no interpolation.


class ReconstructionPictures(Callback):
    """Writes `step_<n>.png`: a row of originals, then one row per `keep_k`; also to loggers that take images.

    The images, and the noise their decoding starts from, are the same at every validation.
    """

    def __init__(
        self,
        *,
        folder: str,
        keep_ks: Sequence[int] | None,
        num_images: int,
        timesteps: int,
        guidance_scale: float,
        seed: int,
    ) -> None:
        self.folder = Path(folder)
        self.keep_ks = None if keep_ks is None else list(keep_ks)
        self.num_images = num_images
        self.seed = seed
        self.decode_options = {"timesteps": timesteps, "guidance_scale": guidance_scale}
        self._images: list[Tensor] = []
        self._keys: list[str] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._keys = [], []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        missing = self.num_images - len(self._keys)
        if missing > 0 and trainer.is_global_zero:
            self._images.extend(batch["image"][:missing].split(1))
            self._keys.extend(batch["key"][:missing])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Not at `on_validation_end`: the moving average of the weights is still in place here.
        if trainer.sanity_checking or not self._keys:
            return
        model: FlexTok = pl_module.model
        keep_ks = self.keep_ks or default_keep_ks(model.num_registers)
        images = torch.cat(self._images)
        rows = reconstructions(model, images, self._keys, keep_ks=keep_ks, seed=self.seed, **self.decode_options)
        picture = tile([images, *rows])
        name = f"step_{trainer.global_step:06d}.png"
        with atomic_path(self.folder / name) as path:
            Image.fromarray(picture).save(path, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("reconstructions", picture, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("pictures", [picture], step=trainer.global_step)


def reconstructions(
    model: FlexTok,
    images: Tensor,
    keys: Sequence[str],
    *,
    keep_ks: Sequence[int],
    seed: int,
    **decode_options: Any,
) -> list[Tensor]:
    """Return one batch `[batch, 3, height, width]` per `keep_k`; each starts from the same noise."""
    encoded = model.encode(image_data(model, images, keys, seed=seed))
    latents = encoded[model.flow_matching_noise_module.clean_images_read_key]
    sizes = [tuple(entry.shape[-2:]) for entry in latents]
    rows = []
    for keep_k in keep_ks:
        decoded = model.decode(
            {**encoded, model.eval_keep_k_key: [keep_k] * len(keys)},
            generator=image_generators(seed, keys, stream="decode"),
            vae_image_sizes=sizes,
            verbose=False,
            **decode_options,
        )
        rows.append(torch.cat(list(decoded[model.image_write_key])))
    return rows


def tile(rows: Sequence[Tensor]) -> np.ndarray:
    """Join rows of images in [-1, 1] into one array `[height, width, 3]` of bytes."""
    grid = torch.cat([torch.cat(row.unbind(0), dim=2) for row in rows], dim=1)
    pixels = (grid.float().clamp(-1, 1) + 1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    factor = -(-MIN_SIZE // min(rows[0].shape[-2:]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
