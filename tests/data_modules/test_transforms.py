"""Every kind of file becomes an upright 8-bit RGB image, and pixels survive the way to tensors and back."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from flextok.data.transforms import DECODE_ERRORS, decode, resize_shorter_center_crop, to_rgb, to_tensor, to_uint8
from tests.data_modules.images import noise_image, spoil


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


def test_transparent_palette_entries_show_white(tmp_path):
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert decode(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    image = decode(tmp_path / "deep.png")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_cmyk_jpeg_is_read(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "cmyk.jpg")
    assert max(decode(tmp_path / "cmyk.jpg").getpixel((0, 0))) < 10


def test_exif_orientation_turns_the_image_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    upright = decode(tmp_path / "turned.png")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(tmp_path / "moving.webp").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("how", ["empty", "truncated", "text", "wrong format", "damaged header"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_bad_files_raise_what_is_announced(tmp_path, suffix, how):
    path = tmp_path / f"bad.{suffix}"
    noise_image(0, (64, 64)).save(path)
    decode(path)
    spoil(path, how)
    with pytest.raises(DECODE_ERRORS):
        decode(path)


def test_a_decompression_bomb_is_a_bad_file(tmp_path, monkeypatch):
    noise_image(0, (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DECODE_ERRORS):
        decode(tmp_path / "bomb.png")


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
