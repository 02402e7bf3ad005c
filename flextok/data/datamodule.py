"""The one interface behind which every dataset lives."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from flextok.data.loaders import EvalLoader, ResumableLoader, outlive_signals
from flextok.data.samplers import EvalSampler, TrainSampler, rank_and_world_size
from flextok.data.samples import ImageDataset, collate

Split: TypeAlias = Literal["train", "val", "test"]


class ImageDataModule(LightningDataModule, ABC):
    """Batches `{"image": [batch, 3, image_size, image_size] in [-1, 1], "key": list[str]}` of three splits.

    Training batches are shuffled by `(seed, epoch)` and all full; resuming in the middle of an epoch is
    exact. The other splits are read in order, and nothing is dropped. Settings are chosen on `val`, results
    reported on `test`.

    Args:
        image_size: Height and width of the images, in pixels.
        batch_size: Images per training batch on each rank.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        eval_batch_size: Images per batch of `val` and `test`; `None` for `batch_size`.
        seed: Decides order and augmentation of training, never the splits.

    Raises:
        ValueError: A size is not positive, or (in `setup`) the train set does not fill one batch.
    """

    transform: ClassVar[str] = "central square, resized to image_size in one step, bicubic with antialiasing (Pillow)"
    """How images of the splits for evaluation are made, for reports."""

    def __init__(
        self,
        *,
        image_size: int,
        batch_size: int,
        num_workers: int,
        eval_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.datasets: dict[Split, ImageDataset] = {}
        for name, minimum in (
            ("image_size", 1),
            ("batch_size", 1),
            ("eval_batch_size", 1),
            ("num_workers", 0),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(f"data.{name} is {getattr(self, name)}: it must be at least {minimum}")

    @abstractmethod
    def make_datasets(self) -> dict[Split, ImageDataset]:
        """Build the three datasets; called once, in each process."""

    def setup(self, stage: str | None = None) -> None:
        """Build all three datasets, unless that is done; they are cheap until they are read."""
        if not self.datasets:
            self.datasets = self.make_datasets()
        if stage not in (None, "fit"):
            return  # Whoever only evaluates may do so on few images.
        num_images = len(self.datasets["train"])
        largest = num_images // rank_and_world_size()[1]
        if self.batch_size > largest:
            raise ValueError(
                f"data.batch_size is {self.batch_size}, but the train set has only {num_images} "
                f"images for all ranks together: it must be between 1 and {largest}"
            )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled full batches, with a position that checkpoints store."""
        dataset, trainer = self.datasets["train"], self.trainer
        # Not what Lightning passes to set_epoch: after resuming from the end of an epoch with max_steps, that
        # is one ahead of the trainer's own epoch.
        sampler = TrainSampler(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch_of_trainer=None if trainer is None else lambda: trainer.current_epoch,
        )
        return ResumableLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, drop_last=True, **self._common_arguments()
        )

    def val_dataloader(self) -> EvalLoader:
        """All readable validation images, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> EvalLoader:
        """All readable test images, in order."""
        return self._eval_dataloader("test")

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move the tensors; Lightning would look for some in every key of every sample."""
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def whole_batches(self, split: Split) -> "DataLoader[Any]":
        """`val` or `test` in order, in batches that do not depend on the number of ranks, which take turns.

        `None` stands for a batch of which nothing could be read.
        """
        dataset, size = self.datasets[split], self.eval_batch_size
        rank, world_size = rank_and_world_size()
        numbers = list(range(len(dataset)))
        batches = [numbers[start : start + size] for start in numbers[::size]]
        return DataLoader(dataset, batch_sampler=batches[rank::world_size], **self._common_arguments())

    def _eval_dataloader(self, split: Split) -> EvalLoader:
        dataset = self.datasets[split]
        return EvalLoader(
            dataset, batch_size=self.eval_batch_size, sampler=EvalSampler(dataset), **self._common_arguments()
        )

    def _common_arguments(self) -> dict[str, Any]:
        return {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": outlive_signals,
            "pin_memory": torch.cuda.is_available(),
            # Without its own, a loader draws from torch's default generator each time an epoch starts.
            "generator": torch.Generator().manual_seed(self.seed),
        }
