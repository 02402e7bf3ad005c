"""What `tests/malformed.py` says of each file is what the library and the commands do with it."""

import io
import logging
import re
import tracemalloc
import urllib.request

import pytest
from PIL import Image

from flextok.cli import main
from flextok.data import transforms
from flextok.data.image_files import ImageFiles
from flextok.data.tar_shards import key_of, read_shard
from flextok.data.token_shards import TokenShards
from flextok.data.transforms import DECODE_ERRORS, decode, read_image
from flextok.utils.demo import img_from_url
from tests.data_modules.images import noise_image
from tests.malformed import CASES, HANDLED, REFUSED, Handled
from tests.support import export_small_model

each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
# Pillow says so of what we refuse.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def contents():
    return {case.name: case.make() for case in CASES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, contents):
    path = tmp_path_factory.mktemp("malformed")
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_small_model(tmp_path_factory.mktemp("models") / "small")


def run(*words):
    return main([str(word) for word in words])


# --- library ----------------------------------------------------------------------------------------------------------


@each_case
def test_decode(case, folder, contents):
    for encoded in (folder / case.name, contents[case.name]):
        if isinstance(case.expected, Handled):
            image = decode(encoded)
            assert (image.mode, image.size) == ("RGB", case.expected.size)
            for place, color in case.expected.pixels.items():
                difference = max(abs(a - b) for a, b in zip(image.getpixel(place), color, strict=True))
                assert difference <= case.expected.tolerance, place
        else:
            with pytest.raises(DECODE_ERRORS):
                decode(encoded)


@each_case
def test_nothing_takes_much_memory(case, contents):
    """Of Python; what Pillow takes for pixels it takes after the check of the size."""
    tracemalloc.start()
    try:
        decode(contents[case.name])
    except DECODE_ERRORS:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_read_image_says_why(case, contents):
    with pytest.raises(ValueError, match=f"^it cannot be read: {case.expected.reason}"):
        read_image(contents[case.name], name="it")


def test_the_limit_of_pixels_is_ours(monkeypatch):
    """It holds for opened images, too, and whatever a library made of Pillow's."""
    monkeypatch.setattr(transforms, "MAX_PIXELS", 120)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for image in (noise_image(0, (12, 10)), noise_image(0, (10, 12))):
        assert decode(image) is image
    content = io.BytesIO()
    noise_image(0, (11, 11)).save(content, "PNG")
    for encoded in (content.getvalue(), Image.open(content), noise_image(0, (11, 11))):
        with pytest.raises(ValueError, match=r"it is too large \(11 x 11 pixels; at most 120 are read\)"):
            read_image(encoded, name="it")


def test_data_sets_leave_them_out(folder, caplog):
    images = ImageFiles(folder, max_bad_fraction=1.0)
    read = [images.read(number) for number in range(len(images))]
    assert {key for key, _ in filter(None, read)} == {case.name for case in HANDLED}
    assert images.num_bad == len(REFUSED)


@each_case
def test_downloads(case, contents, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: io.BytesIO(contents[case.name]))
    if isinstance(case.expected, Handled):
        assert img_from_url("https://example.org/x", image_size=8).shape == (1, 3, 8, 8)
    else:
        with pytest.raises(ValueError, match=f"^url: 'https://example.org/x' cannot be read: {case.expected.reason}"):
            img_from_url("https://example.org/x")


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_tokenize_names_them_and_leaves_them_out(folder, model, tmp_path, caplog, capsys, workers):
    words = ("tokenize", folder, tmp_path, "--checkpoint", model, "--workers", workers)
    assert run(*words, "--max-bad-fraction", "1") == 0
    tokens = TokenShards(tmp_path)
    assert {sample["key"]: (sample["width"], sample["height"]) for sample in tokens} == {
        case.name: case.expected.size for case in HANDLED
    }
    named = [message for message in caplog.messages if message.startswith("leaving out an unreadable image: ")]
    assert len(named) == len(REFUSED)
    for case in REFUSED:
        assert any(f": {case.name} ({case.expected.reason}" in message for message in named), case.name
    assert f"{len(HANDLED)} images, {len(REFUSED)} unreadable" in capsys.readouterr().out


def test_tokenize_stops_at_too_many(folder, model, tmp_path, capsys):
    assert run("tokenize", folder, tmp_path, "--checkpoint", model, "--workers", 0) == 1
    assert f"of the {len(CASES)} images of SOURCE cannot be read" in capsys.readouterr().err


def test_prepare_leaves_them_out(folder, tmp_path, caplog, capsys):
    caplog.set_level(logging.WARNING)
    assert run("prepare", folder, tmp_path, "--workers", 0, "--max-bad-fraction", 1, "--image-size", 8) == 0
    shards = [sample for path in tmp_path.glob("*.tar") for sample in read_shard(str(path))]
    assert {key_of(sample.key) for sample in shards} == {case.name for case in HANDLED}


@each_case
def test_reconstruct(case, folder, model, tmp_path, capsys):
    out = tmp_path / "out.png"
    status = run("reconstruct", folder / case.name, out, "--checkpoint", model, "--steps", 1, "--keep-k", 1, 8)
    error = capsys.readouterr().err
    if isinstance(case.expected, Handled):
        assert (status, out.exists(), error) == (0, True, "")
    else:
        assert (status, out.exists()) == (1, False)
        assert error.startswith(f"error: FILE: {folder / case.name} cannot be read: {case.expected.reason}")
        assert error.count("\n") == 1


# --- demo; in a browser: tests/end_to_end/test_demo_browser.py --------------------------------------------------------


@each_case
def test_demo(case, folder):
    gradio = pytest.importorskip("gradio")
    from flextok.demo.app import read_upload

    upload = gradio.FileData(path=str(folder / case.name), orig_name=f"../{case.name}")
    if isinstance(case.expected, Handled):
        image, name = read_upload(upload)
        assert (image.mode, image.size, name) == ("RGB", case.expected.size, case.name)
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(case.name)} cannot be read: {case.expected.reason}"):
            read_upload(upload)
