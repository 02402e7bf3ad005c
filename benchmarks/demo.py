"""How long does a visitor of the demo wait? `python -m benchmarks.demo`

Each round starts `flextok demo` anew and uses it in a headless Chromium: until the page can be used, from the choice of
a file until its reconstruction is drawn, the same for a second file, and for a move of the slider.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.command import parse, parser, write
from benchmarks.harness import print_table
from flextok.data.photos import load_photo

REPOSITORY = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHOTOS = ("chelsea", "coffee")
READY, FIRST, SECOND, SLIDER = "command to page", "first reconstruction", "second image", "slider"
# The reconstruction of this file is drawn; the picture is another than that one.
_DRAWN = """([name, before]) => {
  const note = document.querySelector("#result .ft-image span");
  const image = document.querySelector("#result .ft-reconstruction img");
  return note && note.textContent.startsWith(name) && image.complete && image.naturalWidth && image.src !== before;
}"""


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("demo", __doc__, repeats=5)
    command.add_argument("--checkpoint", nargs="+", default=["embedded:photos"])
    options = parse(command, arguments)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        command.error(f"none of {', '.join(BROWSERS)} is on the path")
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.jpg" for name in PHOTOS]
        for name, file in zip(PHOTOS, files, strict=True):
            load_photo(name).save(file)
        rounds = [one_round(browser, files, options) for _ in range(options.repeats)]
    seconds = {what: [one[what] for one in rounds] for what in rounds[0]}
    rows = [
        {"what": what, "median_seconds": median(values), "largest": max(values)} for what, values in seconds.items()
    ]
    print_table(rows)
    write(options, {"checkpoint": options.checkpoint, "rows": rows, "seconds": seconds})


def one_round(browser: str, files: Sequence[Path], options: Any) -> dict[str, float]:
    """Seconds of each of the waits, in a server and a browser of their own."""
    from playwright.sync_api import sync_playwright

    port = _free_port()
    words = ["-m", "flextok", "demo", "--port", port, "--device", options.device, "--checkpoint", *options.checkpoint]
    command = [sys.executable, *map(str, words)]
    with sync_playwright() as playwright:
        # Without the sandbox, which containers do not allow.
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as server:
            try:
                return _use(page, server, files, start)
            finally:
                server.terminate()


def _use(page: Any, server: "subprocess.Popen[str]", files: Sequence[Path], start: float) -> dict[str, float]:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line.startswith("-> http"):
        raise RuntimeError("flextok demo did not start; it says why above")
    page.goto(line.split()[1])
    page.wait_for_selector("#drop input[type=file]", state="attached")
    page.wait_for_selector("#result .ft-welcome")
    seconds = {READY: time.perf_counter() - start}
    for what, file in zip((FIRST, SECOND), files, strict=True):
        seconds[what] = _wait(page, file.name, partial(page.set_input_files, "#drop input[type=file]", file))
    page.wait_for_selector("#gallery .ft-strip")
    slider = page.locator("#keep_k input[type=range]")
    seconds[SLIDER] = _wait(page, files[1].name, partial(slider.press, "ArrowRight"))
    return seconds


def _wait(page: Any, name: str, act: Callable[[], object]) -> float:
    """Seconds from `act` until another reconstruction is drawn, that of the file `name`."""
    picture = page.locator("#result .ft-reconstruction img")
    before = picture.first.get_attribute("src") if picture.count() else ""
    start = time.perf_counter()
    act()
    page.wait_for_function(_DRAWN, arg=[name, before], polling=5)
    return time.perf_counter() - start


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    main()
