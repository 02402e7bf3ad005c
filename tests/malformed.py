"""Image files that are odd, broken or hostile, and what has to become of each: a table for all that reads images.

Contents are made when they are asked for, and none of them takes more than a few megabytes of memory to make.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from tests.data_modules.images import noise_image

Color = tuple[int, int, int]


class Handled(NamedTuple):
    """Read as an upright RGB image of this size, some of whose pixels are known up to `tolerance`."""

    size: tuple[int, int]
    pixels: dict[tuple[int, int], Color]
    tolerance: int = 0


class Refused(NamedTuple):
    """Not read, for this reason."""

    reason: str


class Case(NamedTuple):
    """A file: its name, how its content is made, and what has to become of it."""

    name: str
    make: Callable[[], bytes]
    expected: Handled | Refused

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]


WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)
NO_IMAGE = Refused("it is no JPEG, PNG or WebP image")
DAMAGED = Refused("it is damaged or cut off")
TOO_LARGE = Refused("it is too large")


def saved(image: Image.Image, form: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def marked(mode: str, size: tuple[int, int], color) -> Image.Image:
    """Black, but for the pixel at the upper left."""
    image = Image.new(mode, size)
    image.putpixel((0, 0), color)
    return image


def turned(form: str, size: tuple[int, int]) -> bytes:
    """To be shown turned clockwise by a quarter: what is at the upper left belongs to the upper right."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.new("RGB", size)
    image.paste(WHITE, (0, 0, size[0] // 2, size[1] // 2))
    return saved(image, form, exif=exif)


def transparent_palette() -> bytes:
    image = Image.new("P", (3, 2), 0)
    image.putpalette([10, 20, 30, *RED])
    image.putpixel((1, 0), 1)
    return saved(image, "PNG", transparency=0)


def deep_grey(*values: int) -> bytes:
    return saved(Image.fromarray(np.array([values], dtype=np.uint16)), "PNG")


def animation(form: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    return saved(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def deep_color() -> bytes:
    """A PNG of two pixels with 16 bits in each colour: red, and grey with a value of 0x8000."""
    row = b"\0" + struct.pack(">6H", 65535, 0, 0, 0x8000, 0x8000, 0x8000)
    return png_of(2, 1, depth=16, color_type=2, data=zlib.compress(row))


def png_of(width: int, height: int, *, depth: int, color_type: int, data: bytes, before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """So many zeros, compressed a thousandfold."""
    compressor, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [compressor.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, compressor.compress(bytes(count & ((1 << 20) - 1))), compressor.flush()])


def huge_png(width: int, height: int) -> bytes:
    """A whole black image of one bit per pixel."""
    return png_of(width, height, depth=1, color_type=0, data=zeros(height * (1 + -(-width // 8))))


def huge_jpeg() -> bytes:
    """The header of a JPEG of 65,500 x 65,500 pixels, and the data of a small one."""
    content = saved(noise_image(0), "JPEG")
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", 65500, 65500) + content[at + 4 :]


def text_bomb() -> bytes:
    """A small image whose comment takes 100 MB when it is unpacked."""
    comment = chunk(b"zTXt", b"comment\0\0" + zeros(100 << 20))
    return png_of(2, 1, depth=8, color_type=0, data=zlib.compress(bytes(3)), before=comment)


def data_bomb() -> bytes:
    """A small image with 100 MB of pixels."""
    return png_of(2, 1, depth=8, color_type=0, data=zeros(100 << 20))


def zip_bomb() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("image.png", "w") as member:
        for _ in range(50):
            member.write(bytes(1 << 20))
    return content.getvalue()


def broken(form: str, how: str) -> bytes:
    content = saved(noise_image(0, (64, 64)), form)
    return {
        "truncated": content[:-60],
        "half": content[: len(content) // 2],
        "header_alone": content[:30],
        "damaged_header": content[:12] + b"\xff" * 20 + content[32:],
        "wrong_format": b"GIF89a" + content[6:],
    }[how]


FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
HANDLED = (
    Case(
        "cmyk.jpg",
        lambda: saved(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"),
        Handled((8, 8), {(3, 3): BLACK}, 10),
    ),
    Case("grey.jpg", lambda: saved(Image.new("L", (8, 6), 100), "JPEG"), Handled((8, 6), {(3, 3): (100, 100, 100)}, 2)),
    Case(
        "grey_16_bit.png",
        lambda: deep_grey(0, 257 * 100, 65535),
        Handled((3, 1), {(0, 0): BLACK, (1, 0): (100, 100, 100), (2, 0): WHITE}),
    ),
    Case("color_16_bit.png", deep_color, Handled((2, 1), {(0, 0): RED, (1, 0): (128, 128, 128)})),
    Case("one_bit.png", lambda: saved(marked("1", (9, 4), 1), "PNG"), Handled((9, 4), {(0, 0): WHITE, (8, 3): BLACK})),
    Case("palette.png", transparent_palette, Handled((3, 2), {(0, 0): WHITE, (1, 0): RED})),
    Case(
        "alpha.png",
        lambda: saved(marked("RGBA", (4, 3), (*RED, 255)), "PNG"),
        Handled((4, 3), {(0, 0): RED, (1, 1): WHITE}),
    ),
    Case(
        "alpha.webp",
        lambda: saved(marked("RGBA", (4, 3), (*RED, 255)), "WEBP", lossless=True),
        Handled((4, 3), {(0, 0): RED, (1, 1): WHITE}),
    ),
    Case(
        "grey_alpha.png",
        lambda: saved(marked("LA", (4, 3), (7, 255)), "PNG"),
        Handled((4, 3), {(0, 0): (7, 7, 7), (1, 1): WHITE}),
    ),
    Case("turned.png", lambda: turned("PNG", (4, 2)), Handled((2, 4), {(1, 0): WHITE, (0, 0): BLACK})),
    Case("turned.jpg", lambda: turned("JPEG", (64, 32)), Handled((32, 64), {(28, 4): WHITE, (4, 60): BLACK}, 5)),
    Case("one_pixel.png", lambda: saved(Image.new("RGB", (1, 1), RED), "PNG"), Handled((1, 1), {(0, 0): RED})),
    Case("a_line.png", lambda: saved(Image.new("RGB", (3000, 1), RED), "PNG"), Handled((3000, 1), {(2999, 0): RED})),
    Case("moving.webp", lambda: animation("WEBP"), Handled((4, 4), {(0, 0): RED})),
    Case("moving.png", lambda: animation("PNG"), Handled((4, 4), {(0, 0): RED})),
    Case("another_suffix.jpg", lambda: saved(Image.new("RGB", (2, 2), RED), "PNG"), Handled((2, 2), {(0, 0): RED})),
    # What is more than the header promises is never unpacked.
    Case("data_bomb.png", data_bomb, Handled((2, 1), {(0, 0): BLACK})),
)
REFUSED = (
    Case("20000_x_20000.png", lambda: huge_png(20_000, 20_000), TOO_LARGE),
    Case("just_too_large.png", lambda: huge_png(10_001, 10_000), TOO_LARGE),
    Case("promises_much.jpg", huge_jpeg, TOO_LARGE),
    Case("text_bomb.png", text_bomb, DAMAGED),
    Case("zip_bomb.png", zip_bomb, NO_IMAGE),
    Case("empty.png", bytes, NO_IMAGE),
    Case("text.png", lambda: b"this is no image", NO_IMAGE),
    Case("page.jpg", lambda: b"<!doctype html><html></html>", NO_IMAGE),
    Case("drawing.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_IMAGE),
    Case("gif.png", lambda: saved(noise_image(0), "GIF"), NO_IMAGE),
    Case("tiff.jpg", lambda: saved(noise_image(0), "TIFF"), NO_IMAGE),
    *(
        Case(f"{how}.{suffix}", lambda form=form, how=how: broken(form, how), reason)
        for suffix, form in FORMATS.items()
        for how, reason in (
            ("truncated", DAMAGED),
            ("half", DAMAGED),
            ("header_alone", Refused("it is ")),
            ("damaged_header", Refused("it is ")),
            ("wrong_format", NO_IMAGE),
        )
    ),
)
CASES = (*HANDLED, *REFUSED)
