"""Images in tar shards, on disk or behind any URL, read one after the other."""

from collections.abc import Sequence
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

from flextok.data.datamodule import ImageDataModule, Split
from flextok.data.samplers import rank_and_world_size
from flextok.data.samples import ImageDataset
from flextok.data.shard_images import ImageDecoder, OrderedImages, Shards
from flextok.data.shard_index import INDEX, check_complete, check_shard_size, parse_index, read_index
from flextok.data.shard_streams import StreamedImages
from flextok.data.stream_loader import StreamLoader, StreamSampler
from flextok.data.tar_shards import IMAGES, key_of

_NEEDED: dict[str | None, tuple[Split, ...]] = {
    None: ("train", "val"),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
}
Urls = str | Sequence[str] | None


class WebDatasetDataModule(ImageDataModule):
    """The central square of each image, resized to `image_size`.

    Shards that `flextok prepare` wrote are divided so that ranks and workers read equal parts, each image once per
    epoch. Of other shards each worker reads whole ones. An unreadable image is logged and left out: training takes the
    next one of the same worker in its place. Keys are those `prepare` was given; in other shards, the file name of the
    shard and the name of the sample.

    Args:
        root: A folder that `flextok prepare` wrote, or its URL; or `None`.
        train: Without `root`, paths or URLs of shards; braces are expanded, and stars in paths.
        val: The same for choosing settings. These and those of `test` are counted by reading them once.
        test: The same for results.
        samples_per_epoch: With `train`, how many images are an epoch of all ranks together.
        shuffle_buffer: Images among which each worker draws the next one.
        max_bad_fraction: Part of the images of a split that may be unreadable.
        flip: Whether half of the training images are mirrored, anew in every epoch.
        **common: The arguments of `ImageDataModule`.

    Raises:
        ValueError: If the arguments contradict each other; in `setup`, if shards are missing or too few for all
            workers; while reading, if a shard is damaged or too many images are unreadable.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        train: Urls,
        val: Urls,
        test: Urls,
        samples_per_epoch: int | None,
        shuffle_buffer: int,
        max_bad_fraction: float,
        flip: bool,
        **common: int | None,
    ) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.root = None if root is None else str(root)
        self.urls: dict[Split, Urls] = {"train": train, "val": val, "test": test}
        self.samples_per_epoch = samples_per_epoch
        self.shuffle_buffer = shuffle_buffer
        self.max_bad_fraction = max_bad_fraction
        self.flip = flip
        given = [name for name, urls in self.urls.items() if urls]
        if (root is None) == (not given):
            raise ValueError(
                f"data.root={root!r} with {len(given)} of data.train, data.val, data.test; valid: data.root=<folder "
                "that `flextok prepare` wrote>, or data.train and data.val for other shards"
            )
        if (samples_per_epoch is None) == (train is not None):
            raise ValueError(
                f"data.samples_per_epoch={samples_per_epoch} with data.train={train!r}; valid: the number of images "
                "with data.train, null without it"
            )
        for name, number in (("samples_per_epoch", samples_per_epoch), ("shuffle_buffer", shuffle_buffer)):
            if number is not None and number < 1:
                raise ValueError(f"data.{name} is {number}: it must be at least 1")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {max_bad_fraction}: it must be between 0 and 1")

    def setup(self, stage: str | None = None) -> None:
        """Find the shards; nothing of them is read yet.

        Raises:
            ValueError: As said for the class, and where the stage needs a split that was not given.
        """
        if find_spec("webdataset") is None:
            raise ImportError("data=webdataset needs the package webdataset: pip install 'flextok[webdataset]'")
        self.datasets = self.datasets or self.make_datasets()
        for name in _NEEDED.get(stage, ()):
            if name not in self.datasets:
                raise ValueError(f"data.{name} is missing; give the paths or URLs of its shards, or data.root")
        super().setup(stage)

    def make_datasets(self) -> dict[Split, ImageDataset]:
        """Read the index, or expand the URLs."""
        shards = self._given_shards() if self.root is None else _prepared_shards(self.root)
        datasets: dict[Split, ImageDataset] = {}
        for name, those in shards.items():
            decoder = ImageDecoder(image_size=self.image_size, max_bad_fraction=self.max_bad_fraction)
            datasets[name] = self._stream(those, decoder) if name == "train" else OrderedImages(those, decoder)
        return datasets

    def train_dataloader(self) -> StreamLoader:
        """Shuffled full batches, with a position that checkpoints store."""
        dataset, trainer = self.datasets["train"], self.trainer
        assert isinstance(dataset, StreamedImages)
        sampler = StreamSampler(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch_of_trainer=None if trainer is None else lambda: trainer.current_epoch,
        )
        return StreamLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, drop_last=True, **self._common_arguments()
        )

    def _stream(self, shards: Shards, decoder: ImageDecoder) -> StreamedImages:
        num_streams, num_ranks = max(1, self.num_workers), rank_and_world_size()[1]
        if shards.sizes is None and len(shards.urls) < num_streams * num_ranks:
            raise ValueError(
                f"data.train names {len(shards.urls)} shards, but {num_ranks} ranks with data.num_workers="
                f"{self.num_workers} need one for each worker, {num_streams * num_ranks}; valid: fewer workers or "
                "ranks, or shards that `flextok prepare` made of these, which can be shared"
            )
        return StreamedImages(
            shards,
            decoder,
            num_samples=self.samples_per_epoch or shards.ends[-1],
            num_streams=num_streams,
            batch_size=self.batch_size,
            shuffle_buffer=self.shuffle_buffer,
            flip=self.flip,
            seed=self.seed,
        )

    def _given_shards(self) -> dict[Split, Shards]:
        return {
            name: Shards(_expand(urls, f"data.{name}"), None, _key_in_other_shards)
            for name, urls in self.urls.items()
            if urls
        }


def _prepared_shards(root: str) -> dict[Split, Shards]:
    is_url = bool(urlparse(root).scheme)
    folder = root.rstrip("/") if is_url else str(Path(root).expanduser())
    index = parse_index(_read_url(f"{folder}/{INDEX}"), root, IMAGES) if is_url else read_index(Path(folder), IMAGES)
    found: dict[Split, Shards] = {}
    for name in ("train", "val", "test"):
        split = index["splits"].get(name, {"shards": [], "samples": 1, "shard_size": 1})
        check_complete(split, name, root, IMAGES)
        for shard in () if is_url else split["shards"]:
            check_shard_size(Path(folder), shard, IMAGES)
        urls = [f"{folder}/{shard['file']}" for shard in split["shards"]]
        found[name] = Shards(urls, [shard["samples"] for shard in split["shards"]], _key_in_prepared_shards)
    return found


def _read_url(url: str) -> bytes:
    from webdataset.gopen import gopen

    try:
        with gopen(url) as stream:
            return stream.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{url} cannot be read: {error}") from error


def _key_in_prepared_shards(url: str, key: str) -> str:
    return key_of(key)


def _key_in_other_shards(url: str, key: str) -> str:
    # Names of samples often repeat from shard to shard.
    return f"{urlparse(url).path.rpartition('/')[2] or url}/{key}"


def _expand(urls: Urls, field: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    assert urls is not None
    found: list[str] = []
    for url in [each for text in ([urls] if isinstance(urls, str) else urls) for each in expand_urls(text)]:
        if urlparse(url).scheme:
            found.append(url)
            continue
        files = sorted(glob(str(Path(url).expanduser())))
        if not files:
            raise ValueError(f"{field}: no such file: {url}; valid: paths or URLs of tar shards")
        found += files
    return found
