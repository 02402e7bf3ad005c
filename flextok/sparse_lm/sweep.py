"""`sweep`: maskers by density against perplexity, needles and speed of a model; and its table and picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flextok.sparse_lm.evaluate import Specs, decode_speed, needles_found, perplexity
from flextok.sparse_lm.needles import KEYS, TEMPLATE, VALUES, make_needles

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SpecsOf = Callable[[int], Specs]
"""Maskers for a length of texts."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What is measured; ValueError for numbers out of range."""

    context: int
    """Tokens of a window for perplexity."""
    windows: int
    lengths: Sequence[int]
    """Of texts with needles."""
    depths: Sequence[float]
    needles: int
    """Per length and depth; 0 for none."""
    template: str = TEMPLATE
    decode_lengths: Sequence[int] = ()
    """Of texts after which the speed of decoding is measured."""
    dense_prefill: bool = False
    """Texts with needles are read densely."""
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"context": 4, "windows": 1, "needles": 0}
        for name, value in lowest.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {value}")
        for length in (*self.lengths, *self.decode_lengths):
            if length < 2:
                raise ValueError(f"length {length}: it must be at least 2")

    @property
    def num_steps(self) -> int:
        """Of a progress bar, for each list of maskers."""
        return 1 + self.needles * len(self.depths) * len(self.lengths) + len(self.decode_lengths)


def sweep(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    points: Sequence[tuple[str, float, SpecsOf]],
    settings: SweepSettings,
    report: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Everything that `settings` ask for, of the dense model and of each point: a label, a density, and its maskers.

    Returns:
        `protocol` and `results`: per point `maskers`, `asked` density, measured `density`, `perplexity`,
        `needles` by length and depth, their mean `found`, and `decode` by length. The first is the dense model.

    Raises:
        ValueError: the text is too short for what is asked.
    """
    ids = Tensor(tokenizer(text, verbose=False)["input_ids"]).long()
    cells = [(length, depth) for length in settings.lengths for depth in settings.depths] if settings.needles else []
    options: dict[str, Any] = {"count": settings.needles, "seed": settings.seed, "template": settings.template}
    needles = {
        (length, depth): make_needles(text, tokenizer, length=length, depth=depth, **options) for length, depth in cells
    }
    results = []
    for label, asked, specs_of in [("dense", 1.0, lambda _: None), *points]:
        measured = perplexity(
            model, ids, specs_of(settings.context), context=settings.context, windows=settings.windows
        )
        report(1)
        found: dict[str, dict[str, float]] = {}
        for (length, depth), of_cell in needles.items():
            prefill = settings.dense_prefill
            share = needles_found(model, of_cell, specs_of(length), dense_prefill=prefill, report=report)
            found.setdefault(str(length), {})[str(depth)] = share
        decode = {}
        for length in settings.decode_lengths:
            if label != "dense":
                decode[str(length)] = decode_speed(model, ids, specs_of(length), length=length)
            report(1)
        row = {"maskers": label, "asked": asked, **measured, "needles": found, "decode": decode}
        shares = [share for of_length in found.values() for share in of_length.values()]
        results.append({**row, "found": sum(shares) / len(shares) if shares else None})
    protocol = {**asdict(settings), "parameters": model.num_parameters(), "chance": 1 / len(VALUES), "keys": len(KEYS)}
    return {"protocol": protocol, "results": results}


def format_table(report: Mapping[str, Any]) -> str:
    """Lines for people: a row per point."""
    lengths = [str(length) for length in report["protocol"]["decode_lengths"]]
    head = ["maskers", "asked", "density", "perplexity", "needles", *(f"speed at {length}" for length in lengths)]
    rows = [head]
    for row in report["results"]:
        found = "-" if row["found"] is None else f"{100 * row['found']:.1f} %"
        ratios = [f"{row['decode'][length]['ratio']:.2f}x" if row["decode"] else "1" for length in lengths]
        numbers = [f"{row['asked']:.2f}", f"{row['density']:.3f}", f"{row['perplexity']:.3f}", found]
        rows.append([row["maskers"], *numbers, *ratios])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(report: Mapping[str, Any]) -> "Figure":
    """Perplexity, needles and speed over measured density; dotted is the dense model."""
    from flextok.evaluation.plot import BOUND, COLOURS, panels

    dense, *points = report["results"]
    labels = list(dict.fromkeys(row["maskers"] for row in points))
    lengths = [str(length) for length in report["protocol"]["decode_lengths"]]
    titles = {"perplexity": "perplexity", "found": "needles found"}
    names = [name for name in titles if dense[name] is not None]
    figure, all_axes = panels(len(names) + bool(lengths))
    for index, label in enumerate(labels):
        rows = sorted((row for row in points if row["maskers"] == label), key=lambda row: row["density"])
        densities = [row["density"] for row in rows]
        style = {"marker": "o", "markersize": 4, "color": COLOURS[index % len(COLOURS)], "label": label}
        for axes, name in zip(all_axes, names, strict=False):
            axes.plot(densities, [row[name] for row in rows], **style)
        if lengths:
            ratios = [row["decode"][lengths[-1]]["ratio"] for row in rows]
            all_axes[len(names)].plot(densities, ratios, **style)
    for axes, name in zip(all_axes, names, strict=False):
        axes.axhline(dense[name], linestyle=":", linewidth=1, color=BOUND, label="dense")
        axes.set_ylabel(titles[name])
    if lengths:
        all_axes[len(names)].axhline(1, linestyle=":", linewidth=1, color=BOUND, label="dense")
        all_axes[len(names)].set_ylabel(f"speed of decoding at {lengths[-1]} tokens\n(dense = 1)")
    for axes in all_axes:
        axes.set_xlabel("density: share of pairs attended to")
    all_axes[0].legend(frameon=False, fontsize=8)
    return figure
