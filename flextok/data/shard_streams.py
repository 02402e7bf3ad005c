"""Training images of tar shards, as shuffled streams.

A stream is what one worker process of one rank reads in an epoch: some of the shards, one after the other, through a
buffer that shuffles. Which sample a place in a stream holds depends on seed, epoch and the number of streams alone;
what is open is only remembered to go on quickly.
"""

import os
from collections.abc import Iterator
from itertools import count, islice, repeat
from random import Random
from typing import NamedTuple

import torch

from flextok.data.flips import RandomFlips, mirrored
from flextok.data.samplers import rank_and_world_size
from flextok.data.samples import ImageDataset, Index, Sample, epoch_and_number
from flextok.data.shard_images import ImageDecoder, OrderedImages, Shards
from flextok.data.tar_shards import RawSample
from flextok.seeding import mixed_seed


class _Open(NamedTuple):
    """A stream that is being read: what it is, the place it is at, and how it goes on."""

    process: int
    epoch: int
    place: int
    samples: Iterator[Sample]


class StreamedImages(ImageDataset):
    """Training images in an endless number of epochs of `num_samples`, divided among ranks and `num_streams` each.

    An index is `(epoch, slot)`; slots count the samples of this rank. Where the sizes of the shards are known, each
    stream gets an equal part of their samples, and no sample comes twice in an epoch. Otherwise it gets whole shards,
    and begins them again if they end too early.

    Args:
        batch_size: Slots of a batch belong to one stream, those of the next batch to the next stream.
        shuffle_buffer: Samples among which the next one is drawn.
        flip: Whether half of the images are mirrored, by epoch and key.
    """

    def __init__(
        self,
        shards: Shards,
        decoder: ImageDecoder,
        *,
        num_samples: int,
        num_streams: int,
        batch_size: int,
        shuffle_buffer: int,
        flip: bool,
        seed: int,
    ) -> None:
        self.shards = shards
        self.decoder = decoder
        self.num_samples = num_samples
        self.num_streams = num_streams
        self.batch_size = batch_size
        self.shuffle_buffer = shuffle_buffer
        self.flips = RandomFlips(flip, seed)
        self.seed = seed
        self._in_order = OrderedImages(shards, decoder)
        self.rank, self.num_ranks = rank_and_world_size()
        self._open: dict[int, _Open] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: Index) -> Sample:
        epoch, slot = epoch_and_number(index)
        batch, place = divmod(slot, self.batch_size)
        stream = batch % self.num_streams
        place += batch // self.num_streams * self.batch_size
        opened = self._open.get(stream)
        # A forked process must not go on with a file of its parent.
        if opened is None or opened[:3] != (os.getpid(), epoch, place):
            opened = _Open(os.getpid(), epoch, place, self._samples(epoch, stream, start=place))
        self._open[stream] = opened._replace(place=place + 1)
        return next(opened.samples)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    def variant(self, number: int, variant: int) -> Sample | None:
        """The image itself or mirrored, of the samples in their order; see `RandomFlips.variant`."""
        return self.flips.variant(self.in_order[number], variant)

    def fingerprint(self) -> str:
        """Depends on the shards and their sizes."""
        return self.in_order.fingerprint()

    @property
    def in_order(self) -> OrderedImages:
        """The same samples in the order of the shards.

        Raises:
            ValueError: Nobody knows how many there are.
        """
        if self.shards.sizes is None:
            raise ValueError("data.train: only shards that `flextok prepare` wrote have an order; valid: data.root")
        return self._in_order

    def _samples(self, epoch: int, stream: int, *, start: int) -> Iterator[Sample]:
        """One sample per place; an unreadable one is replaced by the next that can be read, whoever asks from where."""
        waiting = 0
        for raw in islice(self._raw_samples(epoch, stream), start, None):
            waiting += 1
            sample = self.decoder(raw, total=len(self))
            if sample is not None:
                yield from repeat(mirrored(sample) if self.flips.draw(epoch, raw.key) else sample, waiting)
                waiting = 0
            elif waiting > len(self):
                raise ValueError(f"none of the {waiting} training images read last can be decoded")

    def _raw_samples(self, epoch: int, stream: int) -> Iterator[RawSample]:
        from webdataset.filters import shuffle

        size, share = self.shuffle_buffer, self.rank * self.num_streams + stream
        for turn in count():
            rng = Random(mixed_seed("buffer", self.seed, epoch, turn, share))
            raw = None
            for raw in shuffle(size, initial=size, rng=rng)(self._part(epoch, turn, stream)):
                yield raw
            if raw is None:
                raise ValueError(f"the shards for one worker hold no sample: {', '.join(self.shards.urls[:3])}, ...")

    def _part(self, epoch: int, turn: int, stream: int) -> Iterator[RawSample]:
        """What a stream reads, before the buffer."""
        generator = torch.Generator().manual_seed(mixed_seed("shards", self.seed, epoch, turn))
        order = torch.randperm(len(self.shards.urls), generator=generator).tolist()
        if self.shards.sizes is None:
            for shard in order[self.rank * self.num_streams + stream :: self.num_ranks * self.num_streams]:
                yield from self.shards.read(shard)
            return
        start, stop = self._range(stream)
        for shard in order:
            size = self.shards.sizes[shard]
            if start < size and stop > 0:
                # To the end where that is wanted, for it tells whether the shard is whole.
                end = stop if stop < size else None
                yield from islice(self.shards.read(shard), max(start, 0), end)
            start, stop = start - size, stop - size

    def _range(self, stream: int) -> tuple[int, int]:
        """The part of all samples, in the order of the epoch, that a stream gives to its batches."""
        num_batches = self.num_samples // (self.batch_size * self.num_ranks)
        sizes = [len(range(number, num_batches, self.num_streams)) * self.batch_size for number in range(stream + 1)]
        start = self.rank * num_batches * self.batch_size + sum(sizes[:stream])
        return start, start + sizes[stream]
