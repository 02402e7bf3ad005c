"""The served demo: what a visitor may ask for, and what is refused; the page itself is tested in a browser."""

import io
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from flextok.demo.server import MAX_SESSIONS, is_loopback
from flextok.demo.workbench import Workbench
from tests.data_modules.images import noise_image
from tests.demo.support import Visitor, file_data, load_workbench, served

SETTINGS = (1, 1.0, False)


def png(number: int = 0) -> bytes:
    content = io.BytesIO()
    noise_image(number, (12, 9)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def demo(model_folders):
    with served(load_workbench(*model_folders), max_file_bytes=20_000, max_waiting=5) as (app, address):
        yield app, address


@pytest.fixture
def visitor(demo):
    return Visitor(*demo)


def psnrs(html):
    return re.findall(r"<dd>([\d.]+) dB", html)


def test_an_image_is_shown_and_the_slider_changes_what_is_shown(visitor):
    answer = visitor.drop(png(), "cat.png", 2)
    drop, _, message, html = answer["output"]["data"]
    assert (answer["success"], drop, message) == (True, None, "")
    assert html.count("<article") == 2
    moved = visitor.ask("input", None, 3, *SETTINGS)["output"]["data"][0]
    assert moved != html
    assert visitor.ask("input", None, 2, *SETTINGS)["output"]["data"][0] == html
    assert len(psnrs(html)) == 2


def test_visitors_do_not_see_each_other(demo):
    one, other = Visitor(*demo), Visitor(*demo)
    mine = one.drop(png(1), "a.png", 2)["output"]["data"][3]
    theirs = other.drop(png(2), "b.png", 2)["output"]["data"][3]
    assert mine != theirs
    assert one.ask("input", None, 2, *SETTINGS)["output"]["data"][0] == mine
    # Who has dropped nothing keeps the page as it is.
    nobody = Visitor(*demo).ask("input", None, 2, *SETTINGS)["output"]["data"][0]
    assert "<article" not in str(nobody)


def test_a_bad_file_is_named_and_leaves_the_rest_as_it_is(visitor):
    before = visitor.drop(png(), "cat.png", 2)["output"]["data"][3]
    drop, _, message, html = visitor.drop(b"this is <b>no</b> image", "notes.png", 2)["output"]["data"]
    assert "notes.png cannot be read: it is no JPEG, PNG or WebP image" in message
    assert drop is None
    assert "<article" not in str(html)
    assert visitor.ask("input", None, 2, *SETTINGS)["output"]["data"][0] == before


def test_examples_are_chosen_by_name_and_no_other_names_are(visitor):
    answer = visitor.ask("click", 2, *SETTINGS, event_data={"name": "coffee"})
    assert answer["output"]["data"][2].count("<article") == 2
    for name in ("../../etc/passwd", None):
        answer = visitor.ask("click", 2, *SETTINGS, event_data={"name": name})
        assert "<article" not in str(answer["output"])


def test_too_large_files_are_refused(visitor):
    assert visitor.upload(bytes(20_000), "fits.png").status_code == 200
    refused = visitor.upload(bytes(20_001), "large.png")
    assert refused.status_code == 413
    assert "exceeded maximum allowed size" in refused.text


def test_files_that_were_not_uploaded_are_not_read(visitor, tmp_path, model_folders):
    (tmp_path / "secret.png").write_bytes(png())
    for path in (tmp_path / "secret.png", "/etc/hostname", model_folders[0] / "config.json"):
        answer = visitor.ask("upload", file_data(str(path), "x.png"), 2, *SETTINGS)
        assert not answer["success"]
        assert "<article" not in str(answer)
        assert visitor.http.get(f"file={path}").status_code in (403, 404)


def test_addresses_are_not_fetched(visitor, monkeypatch):
    asked = []

    async def fetch(url, **options):
        asked.append(url)

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    for address in ("https://example.org/cat.png", "HTTP://example.org/cat.png"):
        answer = visitor.ask("upload", file_data(address, "cat.png"), 2, *SETTINGS)
        assert not answer["success"]
    assert asked == []


@pytest.mark.parametrize(
    "inputs",
    [(2, 10_000, 1.0, False), (2, 0, 1.0, False), (2, 1, 99.0, False), (10**9, *SETTINGS), (2, "x", 1.0, True)],
)
def test_settings_beyond_the_sliders_are_refused(visitor, inputs):
    visitor.drop(png(), "cat.png", 2)
    answer = visitor.ask("input", None, *inputs)
    assert not answer["success"]
    assert "Traceback" not in str(answer)


def test_pages_ask_nobody_but_the_server(visitor):
    for place in ("../", "config", "no/such/page"):
        policy = visitor.http.get(place).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy


def test_there_is_no_way_around_the_page(demo, visitor):
    app, _ = demo
    assert app.config["dependencies"]
    assert {entry["api_visibility"] for entry in app.config["dependencies"]} == {"private"}
    assert visitor.http.get("info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for number in visitor.calls.values():
        body = {"fn_index": number, "data": [], "session_hash": "x"}
        assert visitor.http.post("run/predict", json=body).status_code >= 400
    for place in ("../docs", "../redoc", "../monitoring"):
        assert visitor.http.get(place).status_code >= 400


def test_the_limits_are_set(demo):
    app, address = demo
    assert address.startswith("http://127.0.0.1:")
    assert app._queue.max_size == 5
    assert {fn.concurrency_limit for fn in app.fns.values()} == {1}
    assert {fn.concurrency_id for fn in app.fns.values()} == {"models"}
    assert app.app.state_holder.capacity == MAX_SESSIONS
    assert app.delete_cache == (60, 600)
    assert app.analytics_enabled is False
    assert (app.allowed_paths, app.share) == ([], False)


def test_who_would_wait_too_long_is_told_so(model_folders, monkeypatch):
    """One request is answered, one waits, and a third is one too many."""
    begun, may_end, show = Event(), Event(), Workbench.read

    def slow(*args):
        begun.set()
        assert may_end.wait(60)
        return show(*args)

    monkeypatch.setattr(Workbench, "read", slow)
    with served(load_workbench(model_folders[0]), max_waiting=1) as demo:
        first = Visitor(*demo)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(first.drop, png(), "cat.png", 2)
            assert begun.wait(60)
            answers = [Visitor(*demo).join("input", None, 1, *SETTINGS) for _ in range(2)]
            may_end.set()
            assert answer.result()["success"]
    assert [response.status_code for response in answers] == [200, 503]
    assert "Queue is full" in answers[1].text


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
    + [("192.168.0.7", False), ("example.org", False)],
)
def test_which_hosts_are_this_machine(host, expected):
    assert is_loopback(host) is expected
