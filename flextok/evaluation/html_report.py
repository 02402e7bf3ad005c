"""The report of one evaluation as a page: `report.html`."""

from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from flextok.evaluation import html, plot
from flextok.evaluation.histogram import histograms
from flextok.evaluation.lengths import SHARES
from flextok.evaluation.pictures import Example
from flextok.evaluation.sweep import SweepResult
from flextok.pictures import tile_size


def write_html(
    sweep: SweepResult, metrics: Mapping[str, Any], cells: Sequence[Sequence[str]], grid: Image.Image, path: Path
) -> None:
    """Write the page of `metrics`; `cells` is the table of results with its header, `grid` the picture."""
    protocol = metrics["protocol"]
    lead = (
        f"{protocol['num_images']} images of split {protocol['split']}, weights {protocol['weights']}, "
        f"{protocol['sampler']}, seed {protocol['seed']}, on {protocol['device']}"
    )
    sections = [
        html.section("Results", html.table(cells[0], cells[1:]), _missing(metrics)),
        _rate_distortion(metrics),
        *_sparse(metrics["results"]),
        *([_targets(sweep, metrics)] if metrics["targets"] else []),
        _tokens(metrics["tokens"]),
        html.section(
            "Throughput",
            html.paragraph("Images per second that one process decodes, the VAE included."),
            html.chart(
                plot.throughput(plot.curves_of(plot.without_budgets(metrics["results"]))),
                "images per second over tokens",
            ),
        ),
        html.section(
            "Reconstructions", f'<div class="scroll">{html.picture(_png(grid), html.PNG, "reconstructions")}</div>'
        ),
        html.section("Best and worst", html.paragraph(_ABOUT_EXTREMES), *_extremes(sweep)),
        html.section("Protocol", html.settings_table(protocol)),
    ]
    html.write_page(path, f"Evaluation of {protocol['checkpoint']}", lead, sections)


_ABOUT_EXTREMES = "By PSNR, at the most tokens of each curve: the image at the left, its reconstruction at the right."


def _missing(metrics: Mapping[str, Any]) -> str:
    reasons = metrics["vae"].get("missing")
    return html.paragraph(f"Missing: {reasons}") if reasons else ""


def _rate_distortion(metrics: Mapping[str, Any]) -> str:
    results, vae = metrics["results"], metrics["vae"]
    known = plot.known_metrics([*results, vae])
    figure = plot.rate_distortion(plot.curves_of(plot.without_budgets(results)), vae, known)
    note = "Bars are standard errors; dotted is what the VAE alone loses."
    return html.section("Rate and distortion", html.paragraph(note), html.chart(figure, "metrics over tokens"))


def _sparse(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(plot.without_budgets(results)) == len(results):
        return []
    note = (
        "Maskers at several budgets, over the share of pairs of query and key that the decoder's self-attention reads."
    )
    return [html.section("Sparse attention", html.paragraph(note), html.chart(plot.over_density(results), "density"))]


_ABOUT_TARGETS = (
    "Of each image the fewest tokens that reconstruct it this well, found by bisection. Means are over the images that "
    "meet the target. Under a share of all images: how many tokens are enough for so many of them, if any are."
)
# Title, column of the row, form.
_TARGET_COLUMNS = (
    *(("tokens", "tokens", ".2f"), ("bits", "bits_per_image", ".1f"), ("bits per pixel", "bits_per_pixel", ".4f")),
    *((f"{share:.0%}", f"tokens_{name}", "d") for name, share in SHARES.items()),
    ("not met", "not_met", ".1%"),
)


def _targets(sweep: SweepResult, metrics: Mapping[str, Any]) -> str:
    rows = metrics["targets"]
    has_curves = len({search.curve for search in sweep.searches}) > 1
    titles = [search.label if has_curves else str(search.target) for search in sweep.searches]
    cells = [
        [title, *(_number(row[name], form) for _, name, form in _TARGET_COLUMNS)]
        for title, row in zip(titles, rows, strict=True)
    ]
    measured = {
        title: (numbers.per_image["tokens"], search.longest)
        for title, search, numbers in zip(titles, sweep.searches, sweep.lengths, strict=True)
        if numbers is not None
    }
    chart = html.chart(histograms(measured), "share of images by number of tokens") if measured else ""
    missing = [html.paragraph(f"{row['target']} is missing: {row['missing']}") for row in rows if "missing" in row]
    table = html.table(["target", *(title for title, _, _ in _TARGET_COLUMNS)], cells)
    return html.section("Tokens an image needs", html.paragraph(_ABOUT_TARGETS), table, *missing, chart)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _tokens(tokens: Mapping[str, Any]) -> str:
    facts = (
        f"{tokens['codes_used']} of {tokens['codebook_size']} codes used ({tokens['codebook_usage']:.1%}), perplexity "
        f"{tokens['perplexity']:.1f}, entropy {tokens['entropy_bits_mean']:.2f} of {tokens['bits_per_token']:.2f} bits."
    )
    chart = html.chart(plot.entropy_of_positions({"entropy": tokens}), "entropy by position")
    return html.section("Tokens", html.paragraph(facts), chart, html.paragraph(tokens["note"]))


def _extremes(sweep: SweepResult) -> list[str]:
    # Of each curve the point with most tokens, which comes last.
    last = {point.curve: (point, found) for point, found in zip(sweep.points, sweep.pictures, strict=True)}
    parts = []
    for index, (point, found) in enumerate(last.values()):
        rows = [
            f'<h3>{kind.capitalize()}</h3>\n<div class="examples">{"".join(map(_example, examples))}</div>\n'
            for kind, examples in found.extremes.items()
        ]
        parts.append(html.details(point.label, "".join(rows), is_open=index == 0))
    return parts


def _example(example: Example) -> str:
    size = tile_size(*example.original.shape[-2:])
    images = "".join(
        html.picture(_png(_pil(image)), html.PNG, name, size=size)
        for name, image in (("image", example.original), ("reconstruction", example.reconstruction))
    )
    return f"<figure>{images}<figcaption>{escape(f'{example.psnr:.2f} dB · {example.key}')}</figcaption></figure>\n"


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
