"""Files of answers against each other: the numbers, as text, JSON and a figure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextok.cli.fusion_scores import COSTS, MODES, SEED, AnswerFile, Interval, accuracies, agreement, differences
from flextok.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from flextok.evaluation.plot import COLOURS, panels
from flextok.utils.checkpoint import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE = "origin"


def compare(files: Sequence[AnswerFile]) -> dict[str, Any]:
    """All numbers of a comparison, in JSON types, over the questions that all files answer.

    Raises:
        ValueError: fewer than two files, no question in common, or lemmas of different lemmatisers.
    """
    names = [file.name for file in files]
    if len({*names}) < 2 or len({*names}) < len(names):
        raise ValueError(f"{', '.join(names)}: valid are two or more, and each once")
    uuids = [uuid for uuid in files[0].by_uuid if all(uuid in file.by_uuid for file in files)]
    if not uuids:
        raise ValueError(f"{', '.join(names)}: have no question in common; valid: answers to the same questions")
    lemmatizers = {file.name: file.run_config.get("lemmatizer") for file in files}
    if len({*lemmatizers.values()}) > 1:
        raise ValueError(
            f"lemmas are of different lemmatisers: {lemmatizers}; valid: one for all, see python -m flextok "
            "fusion-lemmatize"
        )
    reference = next((file for file in files if file.run_config.get("method") == REFERENCE), files[0])
    rows = zip(files, accuracies(files, uuids), differences(files, reference, uuids), strict=True)
    return {
        "num_questions": len(uuids),
        "num_left_out": len({uuid for file in files for uuid in file.by_uuid}) - len(uuids),
        "reference": reference.name,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "lemmatizer": lemmatizers[names[0]],
        "methods": [
            {
                "name": file.name,
                "accuracy": {mode: interval._asdict() for mode, interval in accuracy.items()},
                "difference": {mode: interval._asdict() for mode, interval in difference.items()},
                **file.costs(),
                "run_config": file.run_config,
            }
            for file, accuracy, difference in rows
        ],
        "agreement": [[agreement(left, right, uuids) for right in files] for left in files],
    }


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The comparison as two tables of text."""
    names = [row["name"] for row in comparison["methods"]]
    header = ["method", *MODES, *(f"{mode} - {comparison['reference']}" for mode in MODES)]
    lines = [[*header, "prompt tokens", "new tokens", "seconds"]]
    for row in comparison["methods"]:
        cells = [str(Interval(**row[kind][mode])) for kind in ("accuracy", "difference") for mode in MODES]
        costs = ["-" if row[name] is None else f"{row[name]:.{4 if name == 'seconds' else 1}f}" for name in COSTS]
        lines.append([row["name"], *cells, *costs])
    shares = [["agreement", *names]]
    shares += [
        [name, *(f"{share:.2f}" for share in row)] for name, row in zip(names, comparison["agreement"], strict=True)
    ]
    left_out = comparison["num_left_out"]
    title = f"{comparison['num_questions']} questions" + (
        f", {left_out} that not all answer left out" if left_out else ""
    )
    return "\n\n".join([title, _table(lines), _table(shares)])


def write_comparison(comparison: Mapping[str, Any], path: Path) -> Path:
    """Write the numbers as JSON and a figure beside it; returns the path of the figure."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(comparison, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    figure, (accuracy, tokens, seconds, shares) = panels(4)
    rows = comparison["methods"]
    _accuracies(accuracy, rows)
    _bars(tokens, rows, "prompt_tokens", "prompt tokens per question")
    _bars(seconds, rows, "seconds", "seconds per question")
    _shares(shares, [_label(row["name"]) for row in rows], comparison["agreement"])
    picture = path.with_suffix(".png")
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return picture


def _accuracies(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    for number, mode in enumerate(MODES):
        values = [row["accuracy"][mode] for row in rows]
        means = [value["mean"] for value in values]
        below = [value["mean"] - _or(value["low"], value["mean"]) for value in values]
        above = [_or(value["high"], value["mean"]) - value["mean"] for value in values]
        # The two of a method lie a little apart.
        places = [place + 0.24 * (number - 0.5) for place in range(len(rows))]
        axes.errorbar(
            means, places, xerr=[below, above], fmt="o", markersize=5, capsize=2, color=COLOURS[number], label=mode
        )
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, -0.03), min(right, 1.03))
    axes.set_xlabel("accuracy, with 95 % interval")
    axes.legend(frameon=False, fontsize=8)
    _name_rows(axes, rows)


def _bars(axes: "Axes", rows: Sequence[Mapping[str, Any]], cost: str, label: str) -> None:
    axes.barh(range(len(rows)), [_or(row[cost], 0.0) for row in rows], height=0.6, color=COLOURS[0])
    for place, row in enumerate(rows):
        if row[cost] is None:
            axes.text(0, place, " not measured", va="center", fontsize=8)
    axes.set_xlabel(label)
    _name_rows(axes, rows)


def _name_rows(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    axes.set_yticks(range(len(rows)), [_label(row["name"]) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _shares(axes: "Axes", names: Sequence[str], shares: Sequence[Sequence[float]]) -> None:
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.grid(visible=False)
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            axes.text(
                column,
                row,
                f"{share:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share > 0.6 else "black",
            )
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title("same answer", fontsize=10)


def _label(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
