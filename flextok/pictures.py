"""Draw rows of images with labels into one picture, without a plotting library."""

import math
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flextok.data.transforms import to_pil
from flextok.utils.checkpoint import atomic_path

MIN_TILE, MAX_TILE = 64, 256
GAP, MARGIN, FONT_SIZE = 4, 12, 13
BACKGROUND, TEXT, FAINT_TEXT = (255, 255, 255), (32, 32, 32), (128, 128, 128)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def image_grid(rows: Mapping[str, Tensor]) -> Image.Image:
    """One row of pictures per entry, its label at the left.

    Small images are enlarged by whole factors without smoothing, to at least 64 pixels; large ones reduced
    to 256.

    Args:
        rows: label -> `[N, 3, H, W]` in [-1, 1], all of one shape; lines of a label after the first
            are drawn faint.
    """
    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1:
        raise ValueError(f"rows of shapes {sorted(shapes)}: valid are one or more rows of one shape")
    num_columns, _, height, width = shapes.pop()
    tile_width, tile_height = tile_size(height, width)
    font = ImageFont.load_default(FONT_SIZE)
    label_width = math.ceil(max(font.getlength(line) for label in rows for line in label.split("\n")))
    left = MARGIN + label_width + MARGIN
    canvas = Image.new(
        "RGB",
        (
            left + num_columns * (tile_width + GAP) - GAP + MARGIN,
            MARGIN + len(rows) * (tile_height + GAP) - GAP + MARGIN,
        ),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(rows.items()):
        top = MARGIN + row * (tile_height + GAP)
        _draw_label(draw, label, right=left - MARGIN, middle=top + tile_height // 2, font=font)
        for column, image in enumerate(images):
            tile = to_pil(image).resize((tile_width, tile_height), _filter(tile_width, width))
            canvas.paste(tile, (left + column * (tile_width + GAP), top))
    return canvas


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Width and height at which an image of `height` x `width` pixels is drawn."""
    scale: float = max(1, math.ceil(MIN_TILE / min(height, width)))
    if max(height, width) > MAX_TILE:
        scale = MAX_TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _filter(tile_width: int, width: int) -> Image.Resampling:
    return Image.Resampling.LANCZOS if tile_width < width else Image.Resampling.NEAREST


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    *,
    right: int,
    middle: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    lines = label.split("\n")
    line_height = FONT_SIZE + 4
    first = middle - line_height * (len(lines) - 1) // 2
    for number, line in enumerate(lines):
        colour = TEXT if number == 0 else FAINT_TEXT
        draw.text((right, first + number * line_height), line, fill=colour, font=font, anchor="rm")
