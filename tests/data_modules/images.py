"""Small image files, good and bad, and the data modules the tests read them with."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flextok.data.digits import DigitsDataModule
from flextok.data.image_folder import ImageFolderDataModule
from flextok.data.photos import PhotosDataModule

COMMON = {"batch_size": 4, "num_workers": 0, "seed": 0}


def digits(**changes: Any) -> DigitsDataModule:
    return DigitsDataModule(**({"image_size": 8} | COMMON | changes))


def photos(**changes: Any) -> PhotosDataModule:
    crops = {"min_crop": 16, "max_crop": 100, "train_crops_per_epoch": 22, "num_eval_crops": 10, "flip": True}
    return PhotosDataModule(**({"names": ["chelsea", "china"], "image_size": 8} | crops | COMMON | changes))


def image_folder(root: Path, **changes: Any) -> ImageFolderDataModule:
    settings = {"val_fraction": 0.1, "test_fraction": 0.1, "max_bad_fraction": 0.2, "flip": True, "image_size": 8}
    return ImageFolderDataModule(root=root, **(settings | COMMON | changes))


def noise_image(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def write_images(root: Path, count: int) -> list[Path]:
    paths = [root / f"class_{number % 3}" / f"{number:03d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(number).save(path)
    return paths


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
