"""What the page says is true of the reconstructions, and nothing a visitor names becomes part of the page."""

import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from flextok.data.transforms import to_pil
from flextok.demo import page
from flextok.demo.examples import available_examples
from flextok.demo.pictures import LARGEST_CHANGE, change, draw_change
from flextok.demo.workbench import DemoModel, Workbench
from tests.data_modules.images import noise_image
from tests.demo.support import PLAIN

BITS = math.log2(64000)


@pytest.fixture
def readings(workbench):
    return workbench.read(noise_image(3, (30, 20)), "cat.png")


def pictures(html):
    found = re.findall(r"src='data:image/png;base64,([^']+)'", html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


def cards(html):
    return html.split("<article")[1:]


def test_each_model_has_a_card_with_its_numbers(workbench, readings):
    html = page.results(workbench, readings, 6, PLAIN)
    assert len(cards(html)) == 2
    # The second model has four tokens.
    for card, reading, kept, of in zip(cards(html), readings, (6, 4), (8, 4), strict=True):
        psnr = workbench.reconstruct(reading, [kept], PLAIN)[0].psnr
        values = re.findall(r"<dd>([^<]+)<small>([^<]+)</small>", card)
        assert values == [
            (str(kept), f"of {of}"),
            (f"{kept * BITS:,.1f}", f"{kept} × {BITS:.2f}"),
            (f"{kept * BITS / 64:.3f}", "of 8 × 8"),
            (f"{psnr:.2f} dB", "of this square"),
        ]
        assert len(re.findall("class='ft-kept'", card)) == kept
        assert len(re.findall("class='ft-dropped'", card)) == of - kept
        assert all(f">{token}</span>" in card for token in reading.token_ids)


def test_the_pictures_are_image_reconstruction_change_and_mask(workbench, readings):
    image, reconstruction, changed, mask = pictures(cards(page.results(workbench, readings, 3, PLAIN))[0])
    before, shown = workbench.reconstruct(readings[0], [2, 3], PLAIN)
    assert (image == np.asarray(to_pil(readings[0].square[0]))).all()
    assert (reconstruction == shown.image.permute(1, 2, 0).numpy()).all()
    assert (changed == np.asarray(draw_change(change(before.image, shown.image)))).all()
    assert mask.shape == (384, 384, 3)


def test_the_first_token_is_compared_with_nothing(workbench, readings):
    html = page.results(workbench, readings, 1, PLAIN)
    assert html.count("nothing to compare with") == 2
    assert len(pictures(html)) == 2 * 3


def test_the_gallery_doubles_the_tokens(workbench, readings):
    html = page.gallery(workbench, readings, PLAIN)
    assert re.findall(r"<b>(\d+ tokens?)</b>", html) == [
        *("1 token", "2 tokens", "4 tokens", "8 tokens"),
        *("1 token", "2 tokens", "4 tokens"),
    ]
    # The image, what each number of tokens gives, and what it changed in the one before.
    assert len(pictures(html)) == (1 + 4 + 3) + (1 + 3 + 2)


def test_changes_are_drawn_on_one_scale():
    before = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    after = torch.tensor([100, 100 - LARGEST_CHANGE // 2, 100 + LARGEST_CHANGE], dtype=torch.uint8).expand(3, 1, 3)
    amount = change(before, after)
    assert amount[0, 0].tolist() == [0, LARGEST_CHANGE // 2, LARGEST_CHANGE]
    white, middle, darkest = (draw_change(amount).getpixel((x, 0)) for x in range(3))
    assert (white, darkest) == ((255, 255, 255), (92, 16, 62))
    assert sum(darkest) < sum(middle) < sum(white)
    # Larger changes than the scale knows are the darkest, too.
    most = change(torch.zeros(3, 1, 1, dtype=torch.uint8), torch.full((3, 1, 1), 255, dtype=torch.uint8))
    assert draw_change(most).getpixel((0, 0)) == darkest


def test_names_are_text(workbench, readings):
    name = "<script>alert('x')</script>"
    renamed = [DemoModel(name, model.model, model.image_size) for model in workbench.models]
    other = Workbench(renamed, seed=0, max_remembered=8)
    found = other.read(noise_image(0), name)
    for html in (page.message(name), page.results(other, found, 2, PLAIN), page.gallery(other, found, PLAIN)):
        assert "<script" not in html
        assert "&lt;script&gt;" in html
    assert page.message("") == ""


def test_examples_are_there_or_it_is_said_how_to_get_them(monkeypatch):
    html = page.examples({"coffee": noise_image(0)})
    assert "data-name='coffee'" in html
    assert len(pictures(html)) == 1
    assert "pip install 'flextok[data]'" in page.examples({})
    assert "chelsea" in available_examples()
    monkeypatch.setattr("flextok.data.photos.find_spec", lambda package: None)
    assert available_examples() == []
