"""Who attends to whom in the decoder, as a picture: all patches and all tokens, whatever is computed of them."""

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from flextok.attention.layout import SequenceLayout
from flextok.flextok_wrapper import FlexTok
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker
from flextok.reconstruct import Encoded

HIDDEN, ATTENDS, ATTENDS_MASK_TOKEN = 0, 1, 2
MASK_COLORS = {HIDDEN: "#e9ecf0", ATTENDS: "#1f4e79", ATTENDS_MASK_TOKEN: "#9dbbdb"}
_BORDER = (255, 255, 255)
_SIDE = 384


def decoder_layout(model: FlexTok, encoded: Encoded, keep_k: int) -> SequenceLayout | None:
    """What the decoder's packer says of the row of one image; None for a decoder without a packer.

    Its modules run up to the packer, which is little: projections, no attention.
    """
    data = {
        model.quants_write_key: encoded.quants,
        model.eval_keep_k_key: [keep_k],
        model.pipeline.noised_images_read_key: encoded.latents,
    }
    modules = list(model.decoder.module_dict.values())
    place = next((i for i, module in enumerate(modules) if isinstance(module, BlockWiseSequencePacker)), None)
    if place is None:
        return None
    with torch.no_grad():
        for module in modules[: place + 1]:
            data = module(data)
    layout = data[modules[place].block_mask_write_key]
    # A materialised mask no longer says what its rows are.
    return layout if isinstance(layout, SequenceLayout) else None


def full_mask(layout: SequenceLayout, *, num_tokens: int, keep_k: int) -> UInt8[Tensor, "length length"]:
    """The mask of one image with `num_tokens` tokens of which `keep_k` are kept, row by row what a query attends to.

    The decoder computes less than that: equal mask tokens once, hidden tokens not at all. Here each has its row and
    column again: `HIDDEN`, `ATTENDS` or, to a mask token, `ATTENDS_MASK_TOKEN`.
    """
    (lengths,) = layout.lengths
    attends = layout.dense_mask()[: layout.num_tokens, : layout.num_tokens]
    num_equal = 1 if layout.last_counts is None else layout.last_counts[0]
    rows = torch.arange(layout.num_tokens - 1 + num_equal).clamp(max=layout.num_tokens - 1)
    num_patches = sum(lengths[:-1])
    mask = torch.full((num_patches + num_tokens,) * 2, HIDDEN, dtype=torch.uint8)
    mask[: len(rows), : len(rows)] = torch.where(attends[rows][:, rows], ATTENDS, HIDDEN)
    # What is past keep_k and still attended to is a mask token: the others are hidden.
    dropped = mask[:, num_patches + keep_k :]
    dropped[dropped == ATTENDS] = ATTENDS_MASK_TOKEN
    return mask


def draw_mask(mask: UInt8[Tensor, "length length"], borders: list[int]) -> Image.Image:
    """The mask with a line before each of the `borders`; queries from top to bottom, keys from left to right."""
    colors = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in MASK_COLORS.values()], dtype=np.uint8)
    cell = max(1, _SIDE // len(mask))
    side = cell * len(mask)
    image = Image.fromarray(colors[mask.numpy()]).resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for place in (border * cell for border in borders if 0 < border < len(mask)):
        draw.line((place, 0, place, side), fill=_BORDER, width=3)
        draw.line((0, place, side, place), fill=_BORDER, width=3)
    return image
