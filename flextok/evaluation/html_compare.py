"""A comparison of evaluations as a page, and as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flextok.evaluation import html, plot
from flextok.evaluation.evaluated import Evaluated
from flextok.evaluation.grid import tokens_label


def write_comparison(comparison: Mapping[str, Any], runs: Sequence[Evaluated], path: Path) -> None:
    """Write the page of a comparison of these runs."""
    results = [row for run in runs for row in run.metrics["results"]]
    curves: dict[str, Any] = {}
    for run in runs:
        curves |= plot.curves_of(run.metrics["results"], prefix=f"{run.name}: ")
    known = plot.known_metrics(results)
    tokens = {run.name: run.metrics["tokens"] for run in runs}
    names = [run["name"] for run in comparison["runs"]]
    lead = f"{comparison['num_images']} images; differences are to {comparison['baseline']}"
    about_intervals = (
        f"In brackets the {comparison['confidence']:.0%} interval of the paired bootstrap over images "
        f"({comparison['resamples']:,} resamples, seed {comparison['seed']}). One that contains 0 shows no difference. "
        "It knows chance among images, not among trainings. Distances of sets have none."
    )
    sections = [
        html.section("Runs", _runs(comparison), *map(html.paragraph, comparison["notes"])),
        html.section(
            "Rate and distortion", html.chart(plot.rate_distortion(curves, None, known), "metrics over tokens")
        ),
        _differences(comparison, about_intervals),
        *([_targets(comparison)] if comparison["targets"] else []),
        html.section("Tokens", html.chart(plot.entropy_of_positions(tokens), "entropy by position")),
        html.section("Throughput", html.chart(plot.throughput(curves), "images per second over tokens")),
        html.section("Reconstructions", *(_grid(run) for run in runs)),
        html.section(
            "What the protocols differ in",
            html.table(
                ["setting", *names],
                [[name, *map(html.shown, values)] for name, values in comparison["protocols_differ_in"].items()],
                numbers=False,
            ),
        ),
        html.section(
            "Protocols",
            *(html.details(run.name, html.settings_table(run.metrics["protocol"]), is_open=False) for run in runs),
        ),
    ]
    html.write_page(path, f"Comparison of {len(runs)} evaluations", lead, sections)


def difference_cells(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Differences as text: a header, and a line per run and point."""
    differences = comparison["differences"]
    metrics = list(dict.fromkeys(row["metric"] for row in differences))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in differences:
        point = f"{tokens_label(row['keep_k'])}, {plot.curve_label(row)}"
        lines.setdefault((row["run"], point), {})[row["metric"]] = difference_text(row)
    body = [[*place, *(cells.get(metric, "-") for metric in metrics)] for place, cells in lines.items()]
    return [["run", "point", *metrics], *body]


def target_cells(comparison: Mapping[str, Any]) -> list[list[str]]:
    """How many tokens images need, as text: a header, and a line per run and target."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in comparison["targets"]:
        cells = lines.setdefault((row["run"], f"{row['target']}, {plot.curve_label(row)}"), [])
        cells += [f"{row['baseline']:.2f}", f"{row['value']:.2f}", difference_text(row)]
        if row["metric"] == "bits":
            cells += [f"{row['baseline_not_met']:.1%}", f"{row['not_met']:.1%}"]
    units = [f"{unit}{what}" for unit in ("tokens", "bits") for what in (" before", "", " difference")]
    header = ["run", "target", *units, "not met before", "not met"]
    return [header, *([*place, *cells] for place, cells in lines.items())]


def difference_text(row: Mapping[str, Any]) -> str:
    """Such as `+0.42 [+0.31, +0.53]`, with as many digits as the smallest of the numbers needs."""
    numbers = [row["difference"], *(row[name] for name in ("low", "high") if row[name] is not None)]
    largest = max(map(abs, numbers))
    digits = next((n for n in range(2, 8) if largest >= 10.0 ** (1 - n)), 8) if largest else 2
    difference, *limits = (f"{number:+.{digits}f}" for number in numbers)
    return f"{difference} [{', '.join(limits)}]" if limits else difference


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The differences as aligned text, and what else is to be known."""
    table = _aligned(difference_cells(comparison))
    targets = _aligned(target_cells(comparison))
    differ = ", ".join(comparison["protocols_differ_in"])
    return "\n".join(
        [
            f"differences to {comparison['baseline']} over {comparison['num_images']} images",
            *(table if len(table) > 1 else []),
            *(targets if len(targets) > 1 else []),
            *comparison["notes"],
            f"the protocols differ in: {differ or 'nothing'}",
        ]
    )


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def _runs(comparison: Mapping[str, Any]) -> str:
    header = list(comparison["runs"][0])
    return html.table(header, [[html.shown(run[name]) for name in header] for run in comparison["runs"]], numbers=False)


def _differences(comparison: Mapping[str, Any], about: str) -> str:
    if not comparison["differences"]:
        return html.section("Differences", html.paragraph("The runs have no point in common."))
    figure = plot.differences(comparison["differences"])
    cells = difference_cells(comparison)
    return html.section(
        "Differences",
        html.paragraph(about),
        html.chart(figure, "differences over tokens"),
        html.table(cells[0], cells[1:]),
    )


def _targets(comparison: Mapping[str, Any]) -> str:
    cells = target_cells(comparison)
    about = (
        f"Means over images, and how the run differs from {comparison['baseline']}. An image that does not meet the "
        "target counts with all tokens of its model."
    )
    return html.section("Tokens an image needs", html.paragraph(about), html.table(cells[0], cells[1:]))


def _grid(run: Evaluated) -> str:
    file = run.folder / "grid.png"
    content = html.picture(file.read_bytes(), html.PNG, "reconstructions") if file.exists() else "no picture"
    return html.details(run.name, f'<div class="scroll">{content}</div>', is_open=True)
