"""The demo in a real browser, with the models that come with the package.

Screenshots are kept in the folder that `FLEXTOK_SCREENSHOTS` names, else with the test's temporary files.
"""

import base64
import os
import re
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from flextok.data.photos import load_photo
from tests.demo.support import load_workbench, served
from tests.malformed import CASES, Handled

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IMAGE, RECONSTRUCTION, CHANGE = "#result .ft-image img", "#result .ft-reconstruction img", "#result .ft-change img"
BITS = 15.9658
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
MAX_BYTES = 2 << 20


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome on the path")
    with playwright.sync_playwright() as running:
        # Without the sandbox, which containers do not allow.
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def connections():
    """Hosts that this process, which is the server, connects to."""
    hosts, connect = [], socket.socket.connect

    def watched(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            hosts.append(address[0])
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        yield hosts


@pytest.fixture(scope="module")
def address(connections):
    with served(load_workbench("embedded:photos", "embedded:digits"), max_file_bytes=MAX_BYTES) as (_, address):
        yield address


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("FLEXTOK_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photo") / "my cat.jpg"
    load_photo("chelsea").save(file)
    return file


@pytest.fixture
def page(browser, address, connections):
    """The page, ready to be used; in the end nobody but the server was asked, and no script failed."""
    page = browser.new_page(viewport={"width": 1440, "height": 1080})
    asked, failures = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#drop input[type=file]", state="attached")
    page.wait_for_selector("#result .ft-welcome")
    yield page
    page.close()
    assert failures == []
    assert {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    assert set(connections) <= LOOPBACK


def upload(page, file):
    page.set_input_files("#drop input[type=file]", file)


def drop(page, file):
    """What happens when a file is dragged from the desktop and let go above the field."""
    content = base64.b64encode(file.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([content, name]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
            return transfer;
        }""",
        [content, file.name],
    )
    page.dispatch_event("#drop button", "drop", {"dataTransfer": transfer})


def shown(page, selector=RECONSTRUCTION, number=0):
    """The content of a picture that has been drawn."""
    image = page.locator(selector).nth(number)
    image.wait_for()
    page.wait_for_function("(image) => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    return image.get_attribute("src")


def wait_for_tokens(page, number):
    page.wait_for_function(
        "(text) => document.querySelector('#result dd')?.firstChild.textContent === text", arg=str(number)
    )


def facts(page, card=0):
    return [text.split("\n")[0] for text in page.locator("#result article").nth(card).locator("dd").all_inner_texts()]


@pytest.mark.parametrize("put", [upload, drop])
def test_a_photograph_comes_back_and_dragging_the_slider_changes_it(page, photo, screenshots, put):
    put(page, photo)
    before = shown(page)
    wait_for_tokens(page, 8)
    pixels = page.locator(RECONSTRUCTION).first.screenshot()
    assert facts(page)[:3] == ["8", f"{8 * BITS:.1f}", f"{8 * BITS / 1024:.3f}"]
    changes, masks = shown(page, CHANGE), shown(page, "#result .ft-mask img")
    page.wait_for_selector("#gallery .ft-strip img")
    page.screenshot(path=screenshots / f"{put.__name__}.png", full_page=True)

    slider = page.locator("#keep_k input[type=range]")
    box = slider.bounding_box()
    y, at = box["y"] + box["height"] / 2, box["x"] + box["width"] * 7 / 31
    page.mouse.move(at, y)
    page.mouse.down()
    page.mouse.move(at + 40, y, steps=4)
    page.mouse.move(box["x"] + box["width"] - 1, y, steps=8)
    page.mouse.up()
    wait_for_tokens(page, 32)
    assert shown(page) != before
    assert page.locator(RECONSTRUCTION).first.screenshot() != pixels
    assert (shown(page, CHANGE), shown(page, "#result .ft-mask img")) != (changes, masks)
    assert facts(page)[:3] == ["32", f"{32 * BITS:.1f}", f"{32 * BITS / 1024:.3f}"]
    assert facts(page, 1)[0] == "16"
    page.screenshot(path=screenshots / f"{put.__name__}_dragged.png", full_page=True)

    slider.focus()
    page.keyboard.press("Home")
    wait_for_tokens(page, 1)
    assert page.locator("#result .ft-none").count() == 2
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    wait_for_tokens(page, 8)
    # The same tokens give the same picture.
    assert shown(page) == before


def test_checkpoints_stand_side_by_side_with_all_there_is_to_see(page, photo):
    upload(page, photo)
    page.wait_for_selector("#gallery .ft-strip img")
    cards = page.locator("#result article")
    assert cards.locator("h3").all_inner_texts() == ["embedded:photos", "embedded:digits"]
    left, right = (card.bounding_box() for card in cards.all())
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert shown(page, RECONSTRUCTION, 0) != shown(page, RECONSTRUCTION, 1)
    for card, tokens in zip(cards.all(), (32, 16), strict=True):
        assert card.locator("img").count() == 4
        assert card.locator(".ft-ids span").count() == tokens
    columns = [strip.locator("b").all_inner_texts() for strip in page.locator("#gallery .ft-strip").all()]
    powers = ["The image", "1 token", *(f"{2**i} tokens" for i in range(1, 6))]
    assert columns == [powers, powers[:-1]]
    broken = "[...document.querySelectorAll('img')].filter((i) => !i.complete || !i.naturalWidth).length"
    assert page.evaluate(broken) == 0


def test_every_odd_file_is_shown_or_refused_in_words(page, tmp_path, photo, screenshots):
    upload(page, photo)
    last = shown(page, IMAGE)
    for case in CASES:
        (tmp_path / case.name).write_bytes(case.make())
        text_before = page.locator("#message").inner_text()
        upload(page, tmp_path / case.name)
        if isinstance(case.expected, Handled):
            page.wait_for_selector("#message .ft-message", state="detached")
            page.locator("#result .ft-image span", has_text=case.name).first.wait_for()
            last = shown(page, IMAGE)
        else:
            page.wait_for_function(
                "(text) => document.querySelector('#message').innerText.startsWith(text)", arg=case.name
            )
            text = page.locator("#message").inner_text()
            assert text != text_before
            assert re.match(rf"{re.escape(case.name)} cannot be read: {case.expected.reason}", text)
            # What was there stays.
            assert shown(page, IMAGE) == last
    page.screenshot(path=screenshots / "refused.png", full_page=True)
    upload(page, photo)
    page.wait_for_selector("#message .ft-message", state="detached")
    assert facts(page)[0] == "8"


def test_too_large_files_are_refused_and_others_still_work(page, photo, tmp_path, screenshots):
    (tmp_path / "large.png").write_bytes(bytes(MAX_BYTES + 1))
    upload(page, tmp_path / "large.png")
    page.get_by_text(re.compile(r"exceed.* maximum allowed size of 2\.0 M[Bb].*large\.png")).wait_for()
    page.screenshot(path=screenshots / "too_large.png")
    assert page.locator("#result .ft-welcome").count() == 1
    upload(page, photo)
    assert shown(page)


def test_examples_and_settings(page, screenshots):
    page.locator("#examples button[data-name=coffee]").click()
    coffee = shown(page)
    page.locator("#settings button").first.click()
    page.get_by_label("number input for Steps").fill("4")
    page.get_by_label("number input for Steps").press("Enter")
    page.wait_for_function(f"(last) => document.querySelector({RECONSTRUCTION!r}).src !== last", arg=coffee)
    page.screenshot(path=screenshots / "settings.png", full_page=True)


def test_dark_and_narrow(browser, address, screenshots):
    page = browser.new_page(viewport={"width": 420, "height": 900}, color_scheme="dark")
    page.goto(address)
    page.locator("#examples button[data-name=rocket]").click()
    shown(page)
    page.wait_for_selector("#gallery .ft-strip img")
    # Nothing sticks out at the side.
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.screenshot(path=screenshots / "dark_and_narrow.png", full_page=True)
    page.close()


def test_one_model_alone_fills_the_page(browser, screenshots):
    """The picture in the documentation."""
    with served(load_workbench("embedded:photos")) as (_, address):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(address)
        page.locator("#examples button[data-name=rocket]").click()
        shown(page)
        page.wait_for_selector("#gallery .ft-strip img")
        width = page.locator("#result article").bounding_box()["width"]
        assert width == page.locator("#gallery section").bounding_box()["width"] > 700
        # Not before the mouse has left the example.
        page.mouse.move(600, 5)
        page.screenshot(path=screenshots / "demo.png", full_page=True)
        page.close()
    with Image.open(screenshots / "demo.png") as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(screenshots / "demo.png", optimize=True)
    assert (screenshots / "demo.png").stat().st_size < 250_000
