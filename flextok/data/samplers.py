"""Which sample comes next: orders that depend on the seed and the epoch, and on nothing else.

Both classes are a `DistributedSampler` only because Lightning wraps every other kind in one of its own, and
the data would be divided between the ranks twice.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.utils.data.distributed import DistributedSampler

from flextok.data.samples import ImageDataset
from flextok.seeding import mixed_seed


class TrainSampler(DistributedSampler):
    """Yields `(epoch, number)`, shuffled, in whole batches.

    The epoch travels with the number, so that a dataset derives its augmentation from both and has no state
    of its own. Every rank takes each `world_size`-th sample of one common order. The tail that does not fill
    a batch on every rank is dropped, never padded.

    Args:
        batch_size: Samples per batch on each rank.
        seed: Decides the orders, together with the epoch.
        epoch_of_trainer: Asked for the epoch when an iteration starts; `None` for what `set_epoch` said last.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        seed: int,
        epoch_of_trainer: Callable[[], int] | None = None,
    ) -> None:
        rank, world_size = rank_and_world_size()
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed)
        self.images = dataset
        self.dataset_size = len(dataset)
        self.num_samples = self.dataset_size // (batch_size * world_size) * batch_size
        self.start = 0
        self.epoch_of_trainer = epoch_of_trainer

    def current_epoch(self) -> int:
        """The epoch an iteration that starts now belongs to."""
        return self.epoch if self.epoch_of_trainer is None else self.epoch_of_trainer()

    def start_at(self, position: int) -> None:
        """Leave out this rank's first `position` samples at the next iteration, and only then."""
        self.start = position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = self.current_epoch(), self.start
        self.start = 0
        generator = torch.Generator().manual_seed(mixed_seed("order", self.seed, epoch))
        order = self.images.order(generator)
        mine = order[self.rank :: self.num_replicas][start : self.num_samples]
        return ((epoch, number) for number in mine.tolist())

    def __len__(self) -> int:
        return self.num_samples


class EvalSampler(DistributedSampler):
    """Yields plain numbers in order, repeating and dropping none, so that ranks may differ by one sample."""

    def __init__(self, dataset: ImageDataset) -> None:
        rank, world_size = rank_and_world_size()
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        self.numbers = range(rank, len(dataset), world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def rank_and_world_size() -> tuple[int, int]:
    """This process among those of `torch.distributed`, or `(0, 1)` when it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
