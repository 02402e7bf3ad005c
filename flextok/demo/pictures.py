"""Small pictures of what a token changed, in one scale for all tokens; pictures as part of a page."""

import base64
import io

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

# Mean difference of a pixel's colours, of 255, that is drawn darkest.
LARGEST_CHANGE = 64
_CHANGE_COLORS = np.array([(255, 255, 255), (252, 197, 132), (217, 72, 65), (92, 16, 62)])


def data_uri(image: Image.Image) -> str:
    """An image as a PNG inside an address."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def change(
    before: UInt8[Tensor, "3 height width"], after: UInt8[Tensor, "3 height width"]
) -> UInt8[Tensor, "3 height width"]:
    """How much each colour of each pixel changed."""
    return (after.int() - before.int()).abs().to(torch.uint8)


def draw_change(amount: UInt8[Tensor, "3 height width"]) -> Image.Image:
    """White where nothing changed, darkest where colours changed by `LARGEST_CHANGE` of 255 or more on average.

    One scale for all tokens, so that they can be compared.
    """
    strength = (amount.float().mean(0) / LARGEST_CHANGE).clamp(0, 1).numpy()
    stops = np.linspace(0, 1, len(_CHANGE_COLORS))
    colors = np.stack([np.interp(strength, stops, _CHANGE_COLORS[:, channel]) for channel in range(3)], axis=-1)
    return Image.fromarray(colors.round().astype(np.uint8))
