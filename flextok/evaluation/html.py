"""Pages that hold all they show: style, tables and pictures inside of one file, nothing from elsewhere."""

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextok.evaluation.plot import as_svg
from flextok.utils.checkpoint import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2630; background: #f4f6f8; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 16px 0 8px; }
section { background: #fff; border: 1px solid #dde3e9; border-radius: 8px; padding: 18px 20px; margin-top: 18px; }
p { margin: 0 0 12px; max-width: 80ch; }
.lead, .note { color: #5b6873; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 14px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 12px 4px 0; border-bottom: 1px solid #e8ecf0; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
th, td { white-space: nowrap; }
th { font-weight: 600; border-bottom-color: #b9c4ce; }
table.text td, table.text th { text-align: left; }
table.text td { overflow-wrap: anywhere; white-space: normal; min-width: 12ch; }
table.text td:first-child { white-space: nowrap; }
.scroll > img, .chart { max-width: 100%; height: auto; }
.examples { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; }
figure img { image-rendering: pixelated; margin-right: 4px; background: #e8ecf0; }
figcaption { font-size: 12px; color: #5b6873; max-width: 270px; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; margin: 8px 0; }
code { font-size: 12px; white-space: pre-wrap; }
@media (max-width: 720px) {
  main { padding: 20px 12px 40px; }
  section { padding: 14px 14px; }
  .scroll > .wide { max-width: none; width: 860px; }
}
"""

PNG, SVG = "image/png", "image/svg+xml"


def write_page(path: Path, title: str, lead: str, sections: Iterable[str]) -> None:
    """Write sections, which are HTML already, below a title and a line of text."""
    content = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n{"".join(sections)}</main>\n</body>\n</html>\n'
    )
    with atomic_path(path) as temporary:
        # Names of files need not be UTF-8.
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")


def section(title: str, *parts: str) -> str:
    """A part of a page; `parts` are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(text: str) -> str:
    """A remark."""
    return f'<p class="note">{escape(text)}</p>\n'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table of text; columns of numbers stand on their last digits."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    kind = "" if numbers else ' class="text"'
    return f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'


def details(title: str, content: str, *, is_open: bool) -> str:
    """HTML that can be folded away."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>\n{content}</details>\n"


def picture(content: bytes, kind: str, alt: str, *, size: tuple[int, int] | None = None, is_wide: bool = False) -> str:
    """An image file inside of the page, at `size` (width, height) in pixels or its own.

    A wide one is not made to fit a narrow screen, where nothing in it could be read.
    """
    its_class = "chart wide" if is_wide else "chart"
    shape = f' class="{its_class}"' if size is None else f' width="{size[0]}" height="{size[1]}"'
    return f'<img{shape} alt="{escape(alt)}" src="data:{kind};base64,{b64encode(content).decode()}">'


def chart(figure: "Figure", alt: str) -> str:
    """A figure inside of the page."""
    # More than one panel.
    is_wide = bool(figure.get_figwidth() > 6)
    return f'<div class="scroll">{picture(as_svg(figure), SVG, alt, is_wide=is_wide)}</div>\n'


def settings_table(settings: Mapping[str, Any]) -> str:
    """Names and values, which may be nested."""
    head = "<thead><tr><th>setting</th><th>value</th></tr></thead>"
    body = "".join(
        f"<tr><td>{escape(str(name))}</td><td><code>{escape(shown(value))}</code></td></tr>\n"
        for name, value in settings.items()
    )
    return f'<div class="scroll"><table class="text">{head}\n<tbody>\n{body}</tbody></table></div>\n'


def shown(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, str):
        return value
    return json.dumps(value, indent=1 if isinstance(value, dict) else None, ensure_ascii=False)
