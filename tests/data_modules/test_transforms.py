"""Every mode becomes 8-bit RGB, and pixels survive the way to tensors and back. Files: test_malformed_images.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from flextok.data.transforms import resize_shorter_center_crop, to_rgb, to_tensor, to_uint8
from tests.data_modules.images import noise_image


def test_all_bytes_survive_a_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([pixels, pixels.T, 255 - pixels], axis=-1))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert torch.equal(to_uint8(tensor).permute(1, 2, 0), torch.from_numpy(np.array(image)))


def test_to_uint8_clips_and_keeps_batches():
    images = torch.tensor([-9.0, 0.0, 9.0]).expand(2, 3, 4, 3)
    assert to_uint8(images)[0, 0, 0].tolist() == [0, 128, 255]
    assert to_uint8(images).shape == (2, 3, 4, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


def test_transparent_pixels_show_white():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    assert [to_rgb(rgba).getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (7, 9), (640, 480)])
def test_any_shape_becomes_the_square_asked_for(size):
    assert resize_shorter_center_crop(Image.new("RGB", size), 16).size == (16, 16)


def test_the_crop_is_central():
    image = noise_image(0, (20, 8))
    assert resize_shorter_center_crop(image, 8).tobytes() == image.crop((6, 0, 14, 8)).tobytes()


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize_shorter_center_crop(Image.fromarray(stripes), 8))
    assert abs(small.astype(int) - 127).max() < 30
