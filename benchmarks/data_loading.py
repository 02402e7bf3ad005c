"""How many images per second does one process prepare of each data set? `python -m benchmarks.data_loading`

    python -m benchmarks.data_loading [--data image_folder latents] [--root my_images] [--images 1024] [--repeats 5]

Shuffled training batches as `train.py` gets them, in 0, 1 and 2 worker processes with one thread each; nothing is done
with them. A rate per core is the rate divided by the processes that prepare batches. Data sets and numbers of workers
take turns; every measurement starts its workers anew and first empties what they have fetched ahead.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import hydra
import torch
from lightning import LightningDataModule

from benchmarks import sample_data
from benchmarks.command import parse, parser, write
from benchmarks.harness import print_table
from flextok.config import compose

SOURCES: dict[str, Callable[[Path], list[str]]] = {
    "image_folder": sample_data.image_files,
    "webdataset": sample_data.tar_shards,
    "streaming": sample_data.streaming_chunks,
    "hf": sample_data.table,
    "digits": lambda folder: ["data=digits"],
    "photos": lambda folder: ["data=photos"],
    "latents": sample_data.latents,
}
"""Each fills an empty folder, if it needs one, and returns the overrides that read it; one line per data set."""

WORKERS = (0, 1, 2)
BATCH = 32
AHEAD = 2
"""Batches that each worker fetches before they are asked for: the default of torch."""


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("data_loading", __doc__, repeats=5)
    command.add_argument("--data", nargs="+", choices=sorted(SOURCES), default=list(SOURCES))
    command.add_argument("--root", type=Path, help="images of your own for image_folder; default: made on the spot")
    command.add_argument("--images", type=int, default=1024, help="timed images per measurement, default 1024")
    options = parse(command, arguments)
    num_batches = max(1, options.images // BATCH)
    sources = dict(SOURCES)
    if options.root is not None:
        sources["image_folder"] = lambda folder: ["data=image_folder", f"data.root={options.root}"]
    with TemporaryDirectory() as folder, _one_thread():
        overrides = {}
        for name in options.data:
            (Path(folder) / name).mkdir()
            overrides[name] = sources[name](Path(folder) / name)
        cases = list(itertools.product(options.data, WORKERS))
        seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        for _ in range(options.repeats):
            for name, workers in cases:
                seconds[name, workers].append(load(overrides[name], workers, num_batches))
        images = {name: image_shape(overrides[name]) for name in options.data}
    rows = [row(name, workers, times, images[name], num_batches) for (name, workers), times in seconds.items()]
    print_table([{key: value for key, value in found.items() if key != "seconds"} for found in rows])
    write(
        options, {"batch": BATCH, "images": num_batches * BATCH, "own_images": options.root is not None, "rows": rows}
    )


def row(name: str, workers: int, seconds: Sequence[float], shape: str, num_batches: int) -> dict[str, Any]:
    """What is known about one data set in one number of workers."""
    rate = num_batches * BATCH / median(seconds)
    return {
        "data": name,
        "sample": shape,
        "workers": workers,
        "images_per_second": rate,
        "images_per_second_per_core": rate / max(1, workers),
        "seconds": list(seconds),
    }


def load(overrides: Sequence[str], workers: int, num_batches: int) -> float:
    """Seconds for so many batches, in the pace that workers can keep up."""
    batches = endless_batches(data_module(overrides, workers))
    try:
        for _ in range(1 + AHEAD * workers):
            next(batches)
        start = perf_counter()
        for _ in range(num_batches):
            next(batches)
        return perf_counter() - start
    finally:
        batches.close()


def endless_batches(data: LightningDataModule) -> Generator[Mapping[str, Any], None, None]:
    """Training batches, epoch after epoch, from one loader."""
    loader = data.train_dataloader()
    while True:
        yield from loader


def data_module(overrides: Sequence[str], workers: int) -> LightningDataModule:
    """The data module of a config, set up for training."""
    cfg = compose([*overrides, f"data.num_workers={workers}", f"data.batch_size={BATCH}", "paths.run=none"])
    data: LightningDataModule = hydra.utils.instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    return data


def image_shape(overrides: Sequence[str]) -> str:
    """Shape of one sample, such as `image 3x256x256`."""
    batch = next(endless_batches(data_module(overrides, 0)))
    name = "image" if "image" in batch else "latents"
    return f"{name} {'x'.join(map(str, batch[name].shape[1:]))}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """As worker processes have it, so that those without workers are no faster for their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
