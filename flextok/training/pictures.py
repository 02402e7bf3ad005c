"""Reconstructions of a few validation images at several numbers of tokens, drawn at each validation."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from flextok.flextok_wrapper import FlexTok
from flextok.model.keep_k import default_keep_ks
from flextok.pictures import image_grid, save_image
from flextok.reconstruct import Encoded, decode_latents, decode_tokens
from flextok.training.fsdp import ShardedStrategy
from flextok.training.validation import encode_batch

log = logging.getLogger(__name__)  # `logger` is what numbers and pictures go to.


class ReconstructionPictures(Callback):
    """Writes `step_<n>.png`: a row of originals, then one row per `keep_k`; also to loggers that take images.

    Where the data are latents, the first row is what the VAE makes of them.

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
        self._entries: list[Tensor] = []
        self._keys: list[str] = []
        self._kind = "image"

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._entries, self._keys = [], []

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
            self._kind = "image" if "image" in batch else "latents"
            self._entries.extend(batch[self._kind][:missing].split(1))
            self._keys.extend(batch["key"][:missing])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Not at `on_validation_end`: the moving average of the weights is still in place here.
        if trainer.sanity_checking:
            return
        batch = {self._kind: torch.cat(self._entries), "key": self._keys} if self._keys else None
        if isinstance(trainer.strategy, ShardedStrategy):
            # Each rank has a part of the weights: all of them compute the pictures of rank 0, as they validate.
            batch = trainer.strategy.broadcast(move_data_to_device(batch, "cpu"))
            batch = move_data_to_device(batch, pl_module.device)
            with trainer.precision_plugin.val_step_context():
                rows = pl_module.call(self._rows, pl_module.model, batch) if batch else {}
        else:
            rows = self._rows(pl_module.model, batch) if batch else {}
        if not rows or not trainer.is_global_zero:
            return
        grid = image_grid(rows)
        path = self.folder / f"step_{trainer.global_step:06d}.png"
        try:
            save_image(grid, path)
        except OSError as error:  # No reason to end days of training; a checkpoint that cannot be written is.
            log.warning("%s is left out, it cannot be written: %s", path, error)
        picture = np.asarray(grid)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("reconstructions", picture, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("pictures", [picture], step=trainer.global_step)

    def _rows(self, model: FlexTok, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the picture shows from top to bottom: a label and `[images, 3, height, width]` for each row."""
        keep_ks = self.keep_ks or default_keep_ks(model.num_registers)
        encoded = encode_batch(model, batch, seed=self.seed)
        with model.vae.loaded(encoded.latents[0].device):
            first = {"original": batch["image"]} if "image" in batch else {"latents": decode_latents(model, encoded)}
            rows = reconstructions(model, encoded, keep_ks=keep_ks, seed=self.seed, **self.decode_options)
        labels = [f"{keep_k} of {model.num_registers}" for keep_k in keep_ks]
        return first | dict(zip(labels, rows, strict=True))


def reconstructions(
    model: FlexTok, encoded: Encoded, *, keep_ks: Sequence[int], seed: int, **decode_options: Any
) -> list[Tensor]:
    """One batch of images `[batch, 3, height, width]` per `keep_k`; each starts from the same noise."""
    return [decode_tokens(model, encoded, keep_k=keep_k, seed=seed, **decode_options) for keep_k in keep_ks]
