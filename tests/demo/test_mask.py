"""The mask that the demo shows is the one by which the decoder attends."""

import pytest
import torch

from flextok.attention.layout import layout_of
from flextok.demo.mask import ATTENDS, ATTENDS_MASK_TOKEN, HIDDEN, decoder_layout, draw_mask, full_mask
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker
from flextok.reconstruct import decode_tokens
from tests.data_modules.images import noise_image

PATCHES = 4


@pytest.mark.parametrize("keep_k", [1, 3, 4])
def test_the_layout_is_that_of_decoding(workbench, keep_k):
    for model, reading in zip(workbench.models, workbench.read(noise_image(0), "x"), strict=True):
        packer = next(m for m in model.model.decoder.modules() if isinstance(m, BlockWiseSequencePacker))
        seen = []
        hook = packer.register_forward_hook(lambda module, _, data, seen=seen: seen.append(dict(data)))
        with torch.no_grad():
            decode_tokens(model.model, reading.encoded, keep_k=keep_k, seed=0, timesteps=1)
        hook.remove()
        assert decoder_layout(model.model, reading.encoded, keep_k) == seen[0][packer.block_mask_write_key]


@pytest.mark.parametrize("keep_k", [1, 7, 8])
def test_dropped_tokens_are_attended_to_as_mask_tokens(workbench, keep_k):
    reading = workbench.read(noise_image(0), "x")[0]
    mask = full_mask(decoder_layout(reading.model.model, reading.encoded, keep_k), num_tokens=8, keep_k=keep_k)
    assert mask.shape == (PATCHES + 8, PATCHES + 8)
    assert (mask[:, : PATCHES + keep_k] == ATTENDS).all()
    assert (mask[:, PATCHES + keep_k :] == ATTENDS_MASK_TOKEN).all()


@pytest.mark.parametrize("keep_k", [1, 3, 4])
def test_dropped_tokens_that_are_left_out_have_empty_rows_and_columns(workbench, keep_k):
    reading = workbench.read(noise_image(0), "x")[1]
    mask = full_mask(decoder_layout(reading.model.model, reading.encoded, keep_k), num_tokens=4, keep_k=keep_k)
    kept = PATCHES + keep_k
    assert mask.shape == (PATCHES + 4, PATCHES + 4)
    assert (mask[:kept, :kept] == ATTENDS).all()
    assert (mask[kept:] == HIDDEN).all()
    assert (mask[:, kept:] == HIDDEN).all()


def test_an_order_and_hidden_tokens_show():
    layout = layout_of([(2, 3)], mode="causal_last", keep_last=[2], total=8)
    assert full_mask(layout, num_tokens=3, keep_k=2).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]


def test_a_decoder_without_a_packer_has_no_mask(workbench):
    reading = workbench.read(noise_image(0), "x")[0]
    modules = reading.model.model.decoder.module_dict
    del modules[next(name for name, module in modules.items() if isinstance(module, BlockWiseSequencePacker))]
    assert decoder_layout(reading.model.model, reading.encoded, 1) is None


def test_the_picture_has_a_cell_for_each_pair_and_lines_between_parts():
    mask = torch.tensor([[1, 0, 2], [1, 1, 2], [1, 1, 2]], dtype=torch.uint8)
    image = draw_mask(mask, [0, 2, 3])
    assert image.size == (384, 384)
    assert image.getpixel((10, 10)) == (0x1F, 0x4E, 0x79)
    assert image.getpixel((200, 10)) == (0xE9, 0xEC, 0xF0)
    assert image.getpixel((300, 10)) == (0x9D, 0xBB, 0xDB)
    assert [image.getpixel((256, y)) for y in (10, 300)] == [(255, 255, 255)] * 2
    assert draw_mask(torch.zeros(512, 512, dtype=torch.uint8), []).size == (512, 512)
