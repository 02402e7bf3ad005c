"""Pages of the site that are no documents of their own: the notebook, the config files, the table of benchmarks."""

import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# What our documents link to, so that the links also work in the repository, and the page that shows it here.
PAGES = {
    "tokenizer.ipynb": "tokenizer.md",
    "../configs": "config_files.md",
    "../benchmarks/README.md": "benchmarks.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the pictures of the notebook."""
    made: dict[str, str | bytes] = {
        "config_files.md": config_page(ROOT / "configs"),
        "benchmarks.md": (ROOT / "benchmarks" / "README.md").read_text(),
        **notebook_pages(ROOT / "docs" / "tokenizer.ipynb"),
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links lead to these pages."""
    for target, page in PAGES.items():
        markdown = markdown.replace(f"]({target}", f"]({page}")
    return markdown


def on_post_page(output: str, **_: Any) -> str:
    """Refuse a page that would load anything from elsewhere: links may lead away, the site itself needs no network."""
    loaded = re.search(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""", output)
    if loaded is not None:
        raise PluginError(f"the page loads {loaded[0]}; valid are files of the site alone")
    return output


def config_page(folder: Path) -> str:
    """Every file below `folder` as it is: a heading for each group, a tab for each option."""
    lines = [
        "# Config files",
        "The files in `configs/` as they are; [configuration](configuration.md) says how to use them.",
        "## Entry points",
        *_tabs(folder),
    ]
    for group in sorted({file.parent for file in folder.glob("*/**/*.yaml")}):
        lines += [f"## {group.relative_to(folder).as_posix()}", *_tabs(group)]
    return "\n\n".join(lines)


def _tabs(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.yaml")):
        yield f'=== "{file.stem}"\n\n    ```yaml\n' + _indented(file.read_text()) + "\n    ```"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip().splitlines())


def notebook_pages(file: Path) -> dict[str, str | bytes]:
    """The page of an executed notebook, and its pictures, by their paths in the site."""
    parts, pictures = [], dict[str, str | bytes]()
    for cell in nbformat.read(file, as_version=4).cells:
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            png = output.get("data", {}).get("image/png")
            if png is not None:
                path = f"{file.stem}_{len(pictures) + 1}.png"
                pictures[path] = b64decode(png)
                parts.append(f"![Output of the cell above]({path})")
            else:
                text = output["text"] if output.output_type == "stream" else output["data"]["text/plain"]
                parts.append(f"```text\n{text.rstrip()}\n```")
    return {f"{file.stem}.md": "\n\n".join(parts), **pictures}
