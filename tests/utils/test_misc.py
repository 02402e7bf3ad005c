import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import ListConfig

from flextok.utils import demo, misc


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (None, None),
        ("fp16", torch.float16),
        ("float16", torch.float16),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp32", torch.float32),
        ("float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_by_name(name, dtype):
    assert misc.str_to_dtype(name) is dtype


def test_unknown_dtype_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"'int8'.*bf16"):
        misc.str_to_dtype("int8")


@pytest.mark.parametrize(
    ("dtype", "outer", "expected"),
    [
        (None, False, torch.float32),
        (None, True, torch.bfloat16),
        ("fp32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
        (torch.bfloat16, False, torch.bfloat16),
    ],
)
def test_autocast_is_left_alone_turned_off_or_turned_on(dtype, outer, expected):
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer), misc.get_autocast_context(x, dtype):
        assert (x @ x).dtype == expected
    with misc.get_autocast_context([x, x], dtype):
        pass


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_autocast_ignores_devices_that_compute_nothing(dtype):
    with misc.get_autocast_context(torch.ones(2, device="meta"), dtype):
        pass


def test_bf16_context():
    x = torch.ones(2, 2)
    with misc.get_bf16_context(True, device_type="cpu"):
        assert (x @ x).dtype == torch.bfloat16
    with misc.get_bf16_context(False):
        assert (x @ x).dtype == torch.float32
    assert isinstance(misc.detect_bf16_support(), bool)


def test_generator_repeats_itself_and_no_seed_means_the_default_one():
    first, second = (torch.rand(3, generator=misc.get_generator(7, "cpu")) for _ in range(2))
    assert torch.equal(first, second)
    assert misc.get_generator() is None


def test_tuples():
    assert misc.to_1tuple(3) == (3,)
    assert misc.to_2tuple(3) == (3, 3)
    assert misc.to_3tuple("ab") == ("ab", "ab", "ab")
    assert misc.to_4tuple(ListConfig([1, 2, 3, 4])) == (1, 2, 3, 4)
    assert misc.to_ntuple(2)([1, 2]) == (1, 2)
    with pytest.raises(ValueError, match="expected one value or 2, got 3"):
        misc.to_2tuple([1, 2, 3])


def test_pictures_have_the_colours_of_their_tensors():
    images = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 6)
    pictures = demo.batch_to_pil(images)
    assert [picture.size for picture in pictures] == [(6, 4), (6, 4)]
    assert np.array(pictures[0])[0, 0].tolist() == [0, 128, 255]
    assert demo.denormalize(torch.tensor([-2.0, -1.0, 0.0, 3.0])).tolist() == [0.0, 0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="valid is"):
        demo.batch_to_pil(torch.zeros(2, 1, 4, 4))


def serve(monkeypatch, data):
    import io
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: io.BytesIO(data))


def test_downloaded_pictures_are_scaled_and_cropped(monkeypatch):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (90, 31), 255).save(file, "PNG")
    serve(monkeypatch, file.getvalue())
    images = demo.imgs_from_urls(["https://example.org/a.png"] * 2, image_size=16)
    assert images.shape == (2, 3, 16, 16)
    assert torch.allclose(images, torch.ones_like(images))


def test_downloaded_pictures_are_those_that_training_would_see(monkeypatch):
    import io

    from PIL import Image

    from flextok.data.transforms import resize_shorter_center_crop, to_tensor

    pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    serve(monkeypatch, file.getvalue())
    expected = to_tensor(resize_shorter_center_crop(Image.fromarray(pixels), 16))
    assert torch.equal(demo.img_from_url("https://example.org/a.png", image_size=16)[0], expected)


def test_addresses_that_are_no_pictures_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="http"):
        demo.img_from_url("file:///etc/hostname")
    serve(monkeypatch, b"<html>")
    with pytest.raises(ValueError, match="it is no JPEG, PNG or WebP"):
        demo.img_from_url("https://example.org")


def test_misc_imports_nothing_heavy():
    program = "import sys, flextok.utils.misc; sys.exit(any(m in sys.modules for m in ('torchvision', 'PIL', 'hydra')))"
    subprocess.run([sys.executable, "-c", program], check=True)
