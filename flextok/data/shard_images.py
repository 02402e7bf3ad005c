"""Images of tar shards: which shards a split has, decoding, and all samples in order, for evaluation."""

import logging
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, islice

import torch

from flextok.data.samples import ImageDataset, Index, Sample, epoch_and_number
from flextok.data.tar_shards import RawSample, read_shard
from flextok.data.transforms import DECODE_ERRORS, decode, resize_shorter_center_crop, to_tensor
from flextok.seeding import mixed_seed

logger = logging.getLogger(__name__)
_NUM_FLAGS = 2**20


class Shards:
    """The shards of one split.

    Args:
        sizes: Samples of each shard; `None` counts them when that is first needed, by reading them all.
        name_key: From the URL of a shard and the name of a sample in it to the key of the sample.
    """

    def __init__(self, urls: Sequence[str], sizes: list[int] | None, name_key: Callable[[str, str], str]) -> None:
        self.urls = list(urls)
        self.sizes = sizes
        self.name_key = name_key

    def count(self) -> list[int]:
        """Samples of each shard."""
        if self.sizes is None:
            logger.info("counting the samples of %d shards", len(self.urls))
            self.sizes = [sum(1 for _ in read_shard(url)) for url in self.urls]
        return self.sizes

    @cached_property
    def ends(self) -> list[int]:
        """Where each shard ends, counted in samples of all of them."""
        return list(accumulate(self.count()))

    def read(self, number: int) -> Iterator[RawSample]:
        """The samples of a shard.

        Raises:
            ValueError: It is damaged, or has another number of samples than it should.
        """
        url, read = self.urls[number], 0
        for sample in read_shard(url):
            read += 1
            yield sample._replace(key=self.name_key(url, sample.key))
        if self.sizes is not None and read != self.sizes[number]:
            raise ValueError(f"the shard {url} is damaged: it has {read} samples, written were {self.sizes[number]}")


class ImageDecoder:
    """Central squares of `image_size` pixels; what cannot be read is logged and counted once each, up to a limit.

    Args:
        max_bad_fraction: Part of the images of a split that may be unreadable, counted on each rank.
    """

    def __init__(self, *, image_size: int, max_bad_fraction: float) -> None:
        self.image_size = image_size
        self.max_bad_fraction = max_bad_fraction
        # By a hash of the key, as nobody knows all keys; in shared memory, so that worker processes count together.
        self._is_bad = torch.zeros(_NUM_FLAGS, dtype=torch.bool).share_memory_()

    @property
    def num_bad(self) -> int:
        """How many images have turned out to be unreadable so far, in this process and its workers."""
        return int(self._is_bad.sum())

    def __call__(self, raw: RawSample, *, total: int) -> Sample | None:
        """The image, or `None` if it cannot be read; `total` is the number of images of the split.

        Raises:
            ValueError: This is one unreadable image too many.
        """
        flag = mixed_seed("bad", raw.key) % _NUM_FLAGS
        try:
            if raw.image is None:
                raise ValueError("the sample has no image file")
            image = decode(raw.image)
        except DECODE_ERRORS as error:
            if self._is_bad[flag]:
                return None
            self._is_bad[flag] = True
            logger.warning("skipping an unreadable image: %s (%r)", raw.key, error)
        else:
            return {"image": to_tensor(resize_shorter_center_crop(image, self.image_size)), "key": raw.key}
        # Rounded up: one bad file among five must not stop a run that tolerates a tenth.
        if self.num_bad > math.ceil(self.max_bad_fraction * total):
            raise ValueError(
                f"{self.num_bad} of {total} images cannot be read, more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows; the last was {raw.key}"
            )
        return None


class OrderedImages(ImageDataset):
    """All samples in the order of the shards. Going on is quick, going back opens the shard again."""

    def __init__(self, shards: Shards, decoder: ImageDecoder) -> None:
        self.shards = shards
        self.decoder = decoder
        self._open: tuple[int, int, int, Iterator[RawSample]] | None = None

    def __len__(self) -> int:
        return self.shards.ends[-1]

    def __getitem__(self, index: Index) -> Sample | None:
        _, number = epoch_and_number(index)
        ends = self.shards.ends
        shard = bisect_right(ends, number)
        place = number - (ends[shard - 1] if shard else 0)
        process, at, done, samples = self._open or (0, 0, 0, iter(()))
        # A forked process must not go on with a file of its parent.
        if (process, at) != (os.getpid(), shard) or done > place:
            done, samples = 0, self.shards.read(shard)
        raw = next(islice(samples, place - done, None), None)
        if raw is None:
            raise ValueError(f"the shard {self.shards.urls[shard]} is damaged: it has no sample {place}")
        self._open = (os.getpid(), shard, place + 1, samples)
        return self.decoder(raw, total=len(self))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": None}

    def fingerprint(self) -> str:
        """Depends on the shards and their sizes."""
        return blake2b(repr((self.shards.urls, self.shards.count())).encode(), digest_size=16).hexdigest()
