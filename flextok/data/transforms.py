"""From files to images to tensors and back, with Pillow alone."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# What Pillow raises for files that are empty, cut off, damaged, too large to be true, or not images. Damage
# in the middle of a file surfaces as whatever the parser tripped over, hence the length.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# Of an image that is read: 300 MB as RGB, several times that on the way there. A few kilobytes may promise more.
MAX_PIXELS = 100_000_000
_FORMATS = ("JPEG", "PNG", "WEBP")
# A file, its content, or an image that somebody has opened.
Encoded: TypeAlias = Path | bytes | Image.Image


def decode(encoded: Encoded) -> Image.Image:
    """Read a JPEG, PNG or WebP as RGB, upright as its EXIF orientation says; the first frame of an animation.

    Raises one of `DECODE_ERRORS` if this is no complete image of one of these formats, or has more than `MAX_PIXELS`.
    """
    image = _load(encoded)
    # Only where needed: exif_transpose copies the image even if it is upright already.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def read_image(encoded: Encoded, *, name: str) -> Image.Image:
    """The same for callers that stop at an image that cannot be read.

    Raises:
        ValueError: It cannot; the message begins with `name` and says why.
    """
    try:
        return decode(encoded)
    except DECODE_ERRORS as error:
        raise ValueError(f"{name} cannot be read: {why_unreadable(error)}") from error


def why_unreadable(error: Exception) -> str:
    """What one of `DECODE_ERRORS` means, in words."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it is too large ({error})"
    if isinstance(error, UnidentifiedImageError):
        return "it is no JPEG, PNG or WebP image"
    if isinstance(error, OSError) and error.errno is not None:
        return str(error)
    return f"it is damaged or cut off ({error!r})"


def _load(encoded: Encoded) -> Image.Image:
    if isinstance(encoded, Image.Image):
        return _load_pixels(encoded)
    with encoded.open("rb") if isinstance(encoded, Path) else BytesIO(encoded) as stream:
        return _load_pixels(Image.open(stream, formats=_FORMATS))


def _load_pixels(image: Image.Image) -> Image.Image:
    # Pillow's own limit is a variable that any library may change, and up to twice of it it only warns.
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
    image.load()
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB: transparent pixels show white, 16-bit grey is scaled."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        # convert() would clip at 255 instead of scaling.
        grey = np.asarray(image).astype(np.int32).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def resize_shorter_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square, resized to `size` pixels with an antialiased bicubic filter, in one step."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def to_tensor(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """An RGB image as float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_uint8(images: Float[Tensor, "*batch 3 height width"]) -> UInt8[Tensor, "*batch 3 height width"]:
    """Images in [-1, 1] as bytes, rounded and clipped: exactly undoes `to_tensor`."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """The RGB picture of an image in [-1, 1], from any device."""
    return Image.fromarray(to_uint8(image.detach()).permute(1, 2, 0).cpu().numpy())
