"""The documentation site: complete, without broken links, and with outputs that the code really gives."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlparse

import nbformat
import pytest
import yaml

from tests.support import REPOSITORY, python

pytest.importorskip("mkdocs")
DOCS = REPOSITORY / "docs"
NOTEBOOK = DOCS / "tokenizer.ipynb"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return load_script("hooks")


# --- completeness -----------------------------------------------------------------------------------------------------


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def test_the_navigation_names_every_page_once(hooks):
    pages = pages_of(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    documents = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(pages) == sorted(documents | set(hooks.PAGES.values()))


def test_the_reference_has_every_module():
    named = {
        name for page in DOCS.glob("api/*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    }
    # Commands and the demo are no library: they explain themselves with --help.
    parts = {
        path.stem
        for path in (REPOSITORY / "flextok").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {name.removeprefix("flextok.") for name in named} == parts - {"__init__", "__main__", "cli", "demo"}


def test_getting_started_lists_every_extra():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`.*`) \|", (DOCS / "getting_started.md").read_text(), flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(extras)


def test_ci_builds_the_site_strictly():
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False  # else it would be Google's
    (command,) = re.findall(r"mkdocs build.*?(?= #|$)", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert command == "mkdocs build"  # --quiet would hide warnings, and strict ends with those it sees
    assert re.search(r"^make .*\bdocs\b", (REPOSITORY / ".ci/run").read_text(), flags=re.MULTILINE)


# --- pages that hooks add ---------------------------------------------------------------------------------------------


def test_the_page_of_configs_has_every_file_as_it_is(hooks):
    page = hooks.config_page(REPOSITORY / "configs")
    for file in (REPOSITORY / "configs").rglob("*.yaml"):
        text = "".join(f"    {line}".rstrip() + "\n" for line in file.read_text().rstrip().splitlines())
        assert f'=== "{file.stem}"\n\n    ```yaml\n{text}    ```' in page, file
    groups = {file.parent.relative_to(REPOSITORY / "configs") for file in (REPOSITORY / "configs").glob("*/**/*.yaml")}
    assert set(re.findall(r"^## (\S+)$", page, flags=re.MULTILINE)) == {group.as_posix() for group in groups}


def test_links_to_what_lies_elsewhere_lead_to_these_pages(hooks):
    text = "[a](tokenizer.ipynb), [b](../configs), [c](../benchmarks/README.md), [d](data.md#a-folder-of-images)"
    expected = "[a](tokenizer.md), [b](config_files.md), [c](benchmarks.md), [d](data.md#a-folder-of-images)"
    assert hooks.on_page_markdown(text) == expected


def test_a_notebook_becomes_a_page_with_its_pictures(hooks, tmp_path):
    v4 = nbformat.v4
    outputs = [
        v4.new_output("stream", name="stdout", text="1\n2\n"),
        v4.new_output("execute_result", data={"text/plain": "<a picture>", "image/png": "iVBORw=="}),
        v4.new_output("execute_result", data={"text/plain": "3"}),
    ]
    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("f()", outputs=outputs), v4.new_markdown_cell("End")]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    pages = hooks.notebook_pages(tmp_path / "a.ipynb")
    assert pages["a_1.png"] == b"\x89PNG"
    assert pages["a.md"].split("\n\n") == [
        "# Title",
        "```python\nf()\n```",
        "```text\n1\n2\n```",
        "![Output of the cell above](a_1.png)",
        "```text\n3\n```",
        "End",
    ]


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example.org/a.js">',
        "<link rel=stylesheet href=//fonts.example.org/css>",
        '<img alt="" src="http://example.org/a.png">',
    ],
)
def test_pages_that_load_anything_from_elsewhere_are_refused(hooks, tag):
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match=re.escape(tag)):
        hooks.on_post_page(f"<html>{tag}</html>")


def test_links_that_lead_elsewhere_are_allowed(hooks):
    page = '<a href="https://arxiv.org/abs/2502.13967">a</a><img src="images/a.png"><script src="a.js"></script>'
    assert hooks.on_post_page(page) == page


# --- the notebook and the pictures ------------------------------------------------------------------------------------


def test_the_notebook_is_stored_with_outputs_of_a_run_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    assert {output.output_type for cell in code for output in cell.outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert NOTEBOOK.stat().st_size < 500_000
    assert not re.search(r"site-packages|/home/|/tmp/|/root/", NOTEBOOK.read_text())  # Outputs of one machine.


def test_every_drawn_picture_is_stored_and_shown():
    drawn = set(load_script("make_pictures").PICTURES)
    stored = {path.name for path in (DOCS / "images").glob("concepts_*.png")}
    shown = set(
        re.findall(r"images/(concepts_\w+\.png)", (DOCS / "concepts.md").read_text() + (DOCS / "index.md").read_text())
    )
    assert drawn == stored == shown


MAIN_RESULTS = """
assert len(psnr) == len(keep_ks) == 6
assert psnr[-1] > psnr[0] + 2, psnr
assert all(later > earlier - 0.3 for earlier, later in zip(psnr, psnr[1:])), psnr
assert ids.shape == (1, 32) and 0 <= ids.min() and ids.max() < codebook_size
assert len(needed) == 32 and any(number is not None and number < 32 for number in needed), needed
assert growing.shape == (9, 3, 32, 32)
"""


@pytest.mark.slow
def test_the_notebook_runs_and_finds_what_it_says(tmp_path):
    make_pictures = load_script("make_pictures")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(MAIN_RESULTS))
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    executed = make_pictures.executed(tmp_path / "notebook.ipynb")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    kinds = [[output.output_type for output in cell.get("outputs", [])] for cell in executed.cells[:-1]]
    assert kinds == [[output.output_type for output in cell.get("outputs", [])] for cell in stored.cells]


@pytest.mark.slow
def test_the_pictures_can_be_drawn_again(tmp_path):
    done = python("docs/make_pictures.py", tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {path.name: path.read_bytes()[:24] for path in tmp_path.glob("*.png")}
    # Format, width and height; pixels differ a little between machines.
    assert drawn == {path.name: path.read_bytes()[:24] for path in (DOCS / "images").glob("concepts_*.png")}


# --- the site itself --------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.mark.slow
def test_the_built_site_has_no_broken_links(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {}
    for file in tmp_path.rglob("*.html"):
        pages[file] = Links()
        pages[file].feed(file.read_text())
    assert len(pages) > 25
    broken = []
    for file, links in pages.items():
        for target in links.targets:
            url = urlparse(target)
            if url.scheme or file.name == "404.html":  # which is shown at any depth
                continue
            other = (file.parent / unquote(url.path)).resolve() if url.path else file
            other = other / "index.html" if other.is_dir() else other
            anchor = unquote(url.fragment)
            if not other.exists() or (anchor and other in pages and anchor not in pages[other].anchors):
                broken.append(f"{file.relative_to(tmp_path)}: {target}")
    assert broken == []
    assert not list(Path(tmp_path).rglob("*.py"))
