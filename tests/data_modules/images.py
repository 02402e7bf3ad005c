"""Small image files, good and bad, and the data modules the tests read them with."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flextok.data.digits import DigitsDataModule
from flextok.data.hf import HuggingFaceDataModule
from flextok.data.image_folder import ImageFolderDataModule
from flextok.data.photos import PhotosDataModule
from flextok.data.streaming import StreamingDataModule
from flextok.data.streaming_writer import write_streaming_split

COMMON = {"batch_size": 4, "num_workers": 0, "seed": 0}


def digits(**changes: Any) -> DigitsDataModule:
    return DigitsDataModule(**({"image_size": 8} | COMMON | changes))


def photos(**changes: Any) -> PhotosDataModule:
    crops = {"min_crop": 16, "max_crop": 100, "train_crops_per_epoch": 22, "num_eval_crops": 10, "flip": True}
    return PhotosDataModule(**({"names": ["chelsea", "china"], "image_size": 8} | crops | COMMON | changes))


def image_folder(root: Path, **changes: Any) -> ImageFolderDataModule:
    settings = {"val_fraction": 0.1, "test_fraction": 0.1, "max_bad_fraction": 0.2, "flip": True, "image_size": 8}
    return ImageFolderDataModule(root=root, **(settings | COMMON | changes))


def streaming(path: Path | str, **changes: Any) -> StreamingDataModule:
    splits = {"train_split": "train", "val_split": "val", "test_split": "test"}
    settings = {"cache_dir": None, "cache_gb": None, "shuffle_chunks": 2, "streams": 1}
    images = {"max_bad_fraction": 0.2, "flip": True, "image_size": 8}
    return StreamingDataModule(**({"path": str(path)} | splits | settings | images | COMMON | changes))


def hugging_face(path: Path | str, **changes: Any) -> HuggingFaceDataModule:
    columns = {"config_name": None, "image_column": "image", "key_column": None}
    splits = {"train_split": "train", "val_split": None, "test_split": None, "val_fraction": 0.1, "test_fraction": 0.1}
    images = {"max_bad_fraction": 0.2, "flip": True, "image_size": 8}
    return HuggingFaceDataModule(**({"path": str(path)} | columns | splits | images | COMMON | changes))


def noise_image(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def encoded_image(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    content = BytesIO()
    noise_image(seed, size).save(content, "PNG")
    return content.getvalue()


def write_images(root: Path, count: int) -> list[Path]:
    paths = [root / f"class_{number % 3}" / f"{number:03d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(number).save(path)
    return paths


def write_streaming(root: Path, *, train: int = 22, held_out: int = 6, bad: tuple[int, ...] = ()) -> Path:
    """A data set of LitData chunks, five images in most of them; `bad` training images cannot be decoded."""
    for split, count, seed in (("train", train, 0), ("val", held_out, 1000), ("test", held_out, 2000)):
        images = [encoded_image(seed + number) for number in range(count)]
        samples = [(f"{split}-{number}", image) for number, image in enumerate(images)]
        if split == "train":
            samples = [(key, b"no image" if n in bad else image) for n, (key, image) in enumerate(samples)]
        write_streaming_split(root / split, samples, shard_bytes=5 * max(map(len, images)))
    return root


def spoil(path: Path, how: str) -> None:
    content = {
        "empty": b"",
        "truncated": path.read_bytes()[:-60],
        "text": b"this is no image",
        "wrong format": b"GIF89a" + path.read_bytes()[6:],
        "damaged header": path.read_bytes()[:12] + b"\xff" * 20 + path.read_bytes()[32:],
    }
    path.write_bytes(content[how])


def keys(loader: Any) -> list[list[str]]:
    return [batch["key"] for batch in loader]
