"""Pictures in and out, for notebooks and examples. Images are `[batch, 3, height, width]` in [-1, 1]."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_BYTES = 100_000_000


def img_from_url(url: str, *, image_size: int = 256, timeout: float = 30.0) -> Tensor:
    """Download one picture, scale its shorter side to `image_size` and crop the centre: `[1, 3, image_size,
    image_size]`.

    Raises ValueError for an address that is not http(s) and for data that is no JPEG, PNG or WebP, OSError if the
    download fails.
    """
    from urllib.request import Request, urlopen

    from flextok.data.transforms import read_image, resize_shorter_center_crop, to_tensor

    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"url: {url!r}; valid are addresses that begin with http:// or https://")
    # Some hosts turn away clients that do not introduce themselves.
    request = Request(url, headers={"User-Agent": "flextok"})
    with urlopen(request, timeout=timeout) as response:
        data = response.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"url: {url!r} holds more than {_MAX_BYTES:,} bytes")
    return to_tensor(resize_shorter_center_crop(read_image(data, name=f"url: {url!r}"), image_size))[None]


def imgs_from_urls(urls: Iterable[str], *, image_size: int = 256, timeout: float = 30.0) -> Tensor:
    """Download several pictures as one batch; see `img_from_url`."""
    return torch.cat([img_from_url(url, image_size=image_size, timeout=timeout) for url in urls])


def denormalize(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]; what lies outside is clipped."""
    return ((images + 1) / 2).clamp(0, 1)


def batch_to_pil(images: Tensor) -> "list[Image]":
    """One RGB picture per sample of `[batch, 3, height, width]` (or of one image without the batch axis)."""
    from flextok.data.transforms import to_pil

    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: shape {tuple(images.shape)}; valid is [batch, 3, height, width]")
    return [to_pil(image) for image in images]
