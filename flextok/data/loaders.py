"""Loaders that know where they are (training) and that leave out what cannot be read (evaluation).

Neither adds an argument to `DataLoader`, because Lightning builds loaders anew from the arguments it knows.
"""

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from flextok.data.samplers import TrainSampler


class ResumableLoader(DataLoader):
    """A loader over a `TrainSampler` whose position can be stored, and restored with any number of workers.

    The position counts what was handed out, not what workers have fetched ahead. Lightning stores it in its
    checkpoints by itself. Reading an epoch to its end moves on to the next one.
    """

    # Not torchdata's StatefulDataLoader: its iterator fetches before Lightning has said which epoch it is in,
    # so that a run resumed from the end of an epoch skips the next one. It also fixes the number of workers.

    _epoch = 0
    _position = 0
    _is_restored = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing happens before the first batch is asked for: Lightning calls iter()
        # before it knows the epoch.
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler):  # Lightning's overfit_batches puts a sequential one here.
            yield from super().__iter__()
            return
        # A position belongs to its epoch: another epoch starts at its beginning.
        epoch = sampler.current_epoch()
        if not (self._is_restored and self._epoch == epoch):
            self._epoch, self._position = epoch, 0
        self._is_restored = False
        sampler.start_at(self._position)
        assert self.batch_size is not None
        for batch in super().__iter__():
            self._position += self.batch_size
            yield batch
        sampler.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is, counted in samples of all ranks, so that their number may change."""
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler):
            return {}
        return {
            "epoch": self._epoch,
            "position": self._position * sampler.num_replicas,
            "seed": sampler.seed,
            "dataset_size": sampler.dataset_size,
            "order_settings": sampler.images.order_settings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: The order it was taken from is not the order of this loader.
        """
        sampler = self.sampler
        if not state or not isinstance(sampler, TrainSampler):
            return
        if state["seed"] != sampler.seed:
            raise ValueError(
                f"data.seed is {sampler.seed}, but the run to resume was shuffled with {state['seed']}: "
                "resume with that seed, or start a new run from its weights"
            )
        if state["dataset_size"] != sampler.dataset_size:
            raise ValueError(
                f"the train set has {sampler.dataset_size} images, but the run to resume had "
                f"{state['dataset_size']}: resume with the same data, or start a new run from its weights"
            )
        ours, theirs = sampler.images.order_settings, state.get("order_settings", "")
        if ours != theirs:
            raise ValueError(
                f"the train set is shuffled with {ours or 'nothing but the seed'}, but that of the run to resume with "
                f"{theirs or 'nothing but the seed'}: resume with the same, or start a new run from its weights"
            )
        epoch, position = state["epoch"], state["position"] // sampler.num_replicas
        if position >= len(sampler):
            epoch, position = epoch + 1, 0
        sampler.set_epoch(epoch)
        self._epoch, self._position, self._is_restored = epoch, position, True


class EvalLoader(DataLoader):
    """A loader that passes over batches of which nothing could be read."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for batch in super().__iter__() if batch is not None)


def outlive_signals(worker: int) -> None:
    """Let the training process answer the signals that a cluster sends to all processes of a job; for DataLoader.

    A worker that died of one would end training in the middle of a step. A worker ends with its training process.
    """
    from lightning.fabric.utilities.seed import pl_worker_init_function

    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    pl_worker_init_function(worker)  # What Lightning would have put in this place.
