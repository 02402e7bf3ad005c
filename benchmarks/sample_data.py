"""Data sets made on the spot: each function fills a folder and returns the overrides of a config that read it."""

import random
from pathlib import Path

import torch

from flextok.cli import main as flextok
from flextok.cli.latent_writer import encode_split
from flextok.cli.shard_folder import ShardFolder
from flextok.data.latent_shards import LATENTS
from flextok.data.photos import load_photo
from flextok.data.samples import ImageDataset, Index, Sample, epoch_and_number
from flextok.data.streaming_writer import write_streaming_split

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "china", "flower")
NUM_FILES = 1024


def image_files(folder: Path) -> list[str]:
    """JPEG files of 256 x 256 pixels, cut out of the photographs that scikit-image and scikit-learn come with."""
    photos, draw = [load_photo(name) for name in PHOTOS], random.Random(0)
    for number in range(NUM_FILES):
        photo = photos[number % len(photos)]
        x, y = draw.randint(0, photo.width - 256), draw.randint(0, photo.height - 256)
        path = folder / f"{number % 16:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((x, y, x + 256, y + 256)).save(path, quality=90)
    return ["data=image_folder", f"data.root={folder}", "data.image_size=256"]


def tar_shards(folder: Path) -> list[str]:
    """The same files in tar shards, as `flextok prepare` writes them."""
    image_files(folder / "images")
    flextok(["prepare", str(folder / "images"), str(folder / "shards")])
    return ["data=webdataset", f"data.root={folder / 'shards'}", "data.image_size=256"]


def streaming_chunks(folder: Path) -> list[str]:
    """The same files in LitData chunks."""
    image_files(folder / "images")
    files = sorted((folder / "images").rglob("*.jpg"))
    few = len(files) // 8
    for split, some in (("train", files[: -2 * few]), ("val", files[-2 * few : -few]), ("test", files[-few:])):
        write_streaming_split(folder / "chunks" / split, ((file.name, file.read_bytes()) for file in some))
    return ["data=streaming", f"data.path={folder / 'chunks'}", "data.image_size=256"]


def table(folder: Path) -> list[str]:
    """The same files in a Hugging Face data set on disk."""
    from datasets import Dataset, Features, Image

    image_files(folder / "images")
    content = [{"bytes": file.read_bytes(), "path": None} for file in sorted((folder / "images").rglob("*.jpg"))]
    Dataset.from_dict({"image": content}, features=Features({"image": Image()})).save_to_disk(folder / "table")
    return ["data=hf", f"data.path={folder / 'table'}", "data.image_size=256"]


def latents(folder: Path) -> list[str]:
    """Latents of the shape of published models: 16 x 32 x 32 numbers in bfloat16 for an image of 256 x 256 pixels."""
    return write_latents(folder, shape=(16, 32, 32), num_samples=NUM_FILES)


def write_latents(folder: Path, *, shape: tuple[int, int, int], num_samples: int) -> list[str]:
    """A folder as `flextok latents` makes it, of random numbers: what they show makes no difference to the time."""
    # What `data=latents` expects unless told otherwise.
    settings = {"data": {"image_size": 256}, "latent": None}
    writer = ShardFolder(folder, settings, LATENTS, argument="folder")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", num_samples), ("val", 64)):
        encode_split(
            writer,
            split,
            _Names(split, count),
            lambda images, keys, variants: torch.randn(len(images), *shape, generator=generator),
            variants=1,
            shard_size=1024,
            dtype=torch.bfloat16,
            batch_size=256,
            num_workers=0,
            report=lambda done: None,
        )
    return ["data=latents", f"data.root={folder}", "data.latent=null"]


class _Names(ImageDataset):
    """Keys as long as usual, of images that nobody looks at."""

    def __init__(self, split: str, count: int) -> None:
        self.split = split
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Index) -> Sample:
        number = epoch_and_number(index)[1]
        return {"image": torch.zeros(3, 1, 1), "key": f"{self.split}/folder_{number % 100:03d}/image_{number:06d}.jpg"}
