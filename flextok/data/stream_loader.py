"""The place of a training run in its streams: slots in order, and what a checkpoint must say to find them again."""

import logging
from collections.abc import Iterator
from typing import Any

from flextok.data.loaders import ResumableLoader
from flextok.data.samplers import TrainSampler
from flextok.data.shard_streams import StreamedImages

logger = logging.getLogger(__name__)


class StreamSampler(TrainSampler):
    """Yields `(epoch, slot)` in order: the data set has shuffled them already."""

    def __init__(self, dataset: StreamedImages, **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self.batch_size = dataset.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # In whole batches, as each is of one stream; another place can come from a run with another batch size.
        start = self.start // self.batch_size * self.batch_size
        self.start = 0
        epoch = self.current_epoch()
        return ((epoch, slot) for slot in range(start, self.num_samples))


class StreamLoader(ResumableLoader):
    """A loader over a `StreamSampler`. A position is exact for the same ranks, workers and batch size alone."""

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is, and how the samples were divided."""
        state = super().state_dict()
        return {**state, **self._division()} if state else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: The order it was taken from is not the order of this loader.
        """
        super().load_state_dict(state)
        division = self._division()
        changed = [f"{state.get(name)} {name} before, {value} now" for name, value in division.items()]
        if state and any(state.get(name) != value for name, value in division.items()):
            logger.warning(
                "the samples of an epoch are divided by ranks, streams (one per worker) and batch size (%s): the rest "
                "of this epoch cannot be the one the interrupted run would have had; some of its images come again "
                "and others not. The next epoch is whole again",
                "; ".join(changed),
            )

    def _division(self) -> dict[str, int]:
        dataset = self.dataset
        assert isinstance(dataset, StreamedImages)
        return {"ranks": dataset.num_ranks, "streams": dataset.num_streams, "batch_size": dataset.batch_size}
