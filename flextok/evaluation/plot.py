"""Draw curves over the number of tokens: quality, throughput, and what each token carries."""

import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from flextok.evaluation.reconstruction import METRICS, PSNR_CAP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, Rows]
"""By label: the results of one curve, with ascending `keep_k`."""

TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "mae": "MAE", "mse": "MSE"}
# Readable beside each other for colour-blind people too; further curves repeat them, dashed.
COLOURS = ("#1f4e79", "#d95f02", "#1b9e77", "#7b4fa3", "#c9a300", "#a6761d", "#cc3d7a", "#555555")
BOUND = "#888888"
COLUMNS = 3


def curves_of(results: Iterable[Mapping[str, Any]], prefix: str = "") -> dict[str, list[Mapping[str, Any]]]:
    """Results of a sweep as curves; the labels begin with `prefix`."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        curves.setdefault(prefix + curve_label(row), []).append(row)
    return curves


def curve_label(row: Mapping[str, Any]) -> str:
    """Which curve a row of the results is of."""
    from flextok.evaluation.grid import Curve

    return Curve(**{name: row.get(name) for name in Curve._fields}).label  # type: ignore[arg-type]


def known_metrics(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Metrics that all of these rows have, those of images first."""
    rows = list(results)
    names = [name.removesuffix("_se") for name in rows[0] if name.endswith("_se")]
    order = [*(name for name in METRICS if name in names), *(name for name in names if name not in METRICS)]
    # Of a Fréchet distance there is no error.
    order += [name for name in rows[0] if name.startswith("fid_") and name not in order]
    return [name for name in order if all(row.get(name) is not None for row in rows)]


def rate_distortion(curves: Curves, vae: Mapping[str, Any] | None, metrics: Sequence[str]) -> "Figure":
    """A panel per metric over `keep_k`; bars are standard errors, dashed is the VAE alone."""
    figure, all_axes = panels(len(metrics))
    for axes, name in zip(all_axes, metrics, strict=False):
        for index, (label, rows) in enumerate(curves.items()):
            errors = [row.get(f"{name}_se") or 0.0 for row in rows]
            _curve(axes, index, [row["keep_k"] for row in rows], [row[name] for row in rows], errors, label)
        # A lossless VAE bounds nothing, and its line would press the curves flat.
        if vae is not None and vae["psnr"] < PSNR_CAP:
            axes.axhline(vae[name], linestyle=":", linewidth=1, color=BOUND, label="VAE only")
        _over_tokens(axes, curves, TITLES.get(name, name))
    _legend(all_axes[0])
    return figure


def without_budgets(results: Rows) -> list[Mapping[str, Any]]:
    """The rows that are not of a list of maskers in a sweep."""
    return [row for row in results if row.get("maskers") in (None, "dense")]


def over_density(results: Rows) -> "Figure":
    """A panel per metric and one for the time, over the share of pairs that attention reads; dotted is dense."""
    metrics = [name for name in known_metrics(results) if name not in ("mae", "mse") and not name.startswith("kid_")]
    dense = {_setting(row): row for row in without_budgets(results)}
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        if _setting(row) in dense and row["maskers"] != "dense":
            names = [row["maskers"], *([_setting(row)] if len(dense) > 1 else [])]
            lines.setdefault(", ".join(names), []).append(row)
    figure, all_axes = panels(len(metrics) + 1)
    for axes, name in zip(all_axes, [*metrics, "seconds_per_image"], strict=False):
        for index, (label, rows) in enumerate(lines.items()):
            rows = sorted(rows, key=lambda row: row["density"])
            errors = [row.get(f"{name}_se") or 0.0 for row in rows]
            _curve(axes, index, [row["density"] for row in rows], [row[name] for row in rows], errors, label)
        for setting, row in dense.items():
            label = f"dense, {setting}" if len(dense) > 1 else "dense"
            axes.axhline(row[name], linestyle=":", linewidth=1, color=BOUND, label=label)
        axes.set_xscale("log")
        axes.set_xticks([0.05, 0.1, 0.25, 0.5, 1], ["0.05", "0.1", "0.25", "0.5", "1"], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("density: share of pairs read")
        axes.set_ylabel({**TITLES, "seconds_per_image": "seconds per image"}.get(name, name))
    all_axes[len(metrics)].set_yscale("log")
    _legend(all_axes[0])
    return figure


def _setting(row: Mapping[str, Any]) -> str:
    """Which point a row is of, but for maskers."""
    return f"{row['keep_k']} tokens, {curve_label({**row, 'maskers': None})}"


def differences(rows: Rows) -> "Figure":
    """A panel per metric: differences over `keep_k` by run and curve; bars are confidence intervals."""
    names = list(dict.fromkeys(row["metric"] for row in rows))
    figure, all_axes = panels(len(names))
    for axes, name in zip(all_axes, names, strict=False):
        curves: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["metric"] == name:
                curves.setdefault(f"{row['run']}: {curve_label(row)}", []).append(row)
        for index, (label, points) in enumerate(curves.items()):
            values = [row["difference"] for row in points]
            limits = [
                [0.0 if row["low"] is None else max(0.0, row["difference"] - row["low"]) for row in points],
                [0.0 if row["high"] is None else max(0.0, row["high"] - row["difference"]) for row in points],
            ]
            _curve(axes, index, [row["keep_k"] for row in points], values, limits, label)
        axes.axhline(0, linewidth=1, color=BOUND)
        _token_axis(axes, {row["keep_k"]: str(row["keep_k"]) for row in rows}, "tokens kept")
        axes.set_ylabel(f"difference, {TITLES.get(name, name)}")
    _legend(all_axes[0])
    return figure


def throughput(curves: Curves) -> "Figure":
    """Images per second of one process over `keep_k`."""
    figure, (axes,) = panels(1)
    for index, (label, rows) in enumerate(curves.items()):
        speeds = [1 / row["seconds_per_image"] for row in rows]
        axes.plot([row["keep_k"] for row in rows], speeds, marker="o", markersize=4, **_style(index), label=label)
    _over_tokens(axes, curves, "images/s, decoding")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def entropy_of_positions(tokens: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Entropy of the ids at each position, by label; dotted is the most that so many images could show."""
    figure, (axes,) = panels(1)
    for index, (label, statistics) in enumerate(tokens.items()):
        values = statistics["entropy_bits_per_position"]
        axes.plot(range(1, len(values) + 1), values, linewidth=1.2, **_style(index), label=label)
    for ceiling in sorted({statistics["entropy_ceiling_bits"] for statistics in tokens.values()}):
        axes.axhline(ceiling, linestyle=":", linewidth=1, color=BOUND, label="ceiling")
    axes.set_xlabel("position of the token")
    axes.set_ylabel("entropy (bits)")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def as_svg(figure: "Figure") -> bytes:
    """The same figure gives the same bytes."""
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context({"svg.hashsalt": "flextok"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def panels(count: int) -> "tuple[Figure, list[Axes]]":
    """A figure of so many panels, and perhaps some that are not seen."""
    # Without pyplot there is no global state and no display: a bare Figure draws with Agg.
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(4.5, 4.2 * columns), 3.4 * rows))
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    found: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in found:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in found[count:]:
        axes.set_visible(False)
    return figure, found


def _curve(
    axes: "Axes", index: int, places: Sequence[int | float], values: Sequence[float], errors: Sequence[Any], label: str
) -> None:
    axes.errorbar(places, values, yerr=errors, marker="o", markersize=4, capsize=2, **_style(index), label=label)


def _over_tokens(axes: "Axes", curves: Curves, title: str) -> None:
    bits = {(row["keep_k"], row["bits_per_image"]) for rows in curves.values() for row in rows}
    keep_ks = {keep_k for keep_k, _ in bits}
    # Bits differ between tokenizers of different codebooks.
    if len(bits) == len(keep_ks):
        _token_axis(axes, {k: f"{k}\n{b:.0f}" for k, b in bits}, "tokens kept (below: bits per image)")
    else:
        _token_axis(axes, {keep_k: str(keep_k) for keep_k in keep_ks}, "tokens kept")
    axes.set_ylabel(title)


def _token_axis(axes: "Axes", ticks: Mapping[int, str], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [ticks[keep_k] for keep_k in sorted(ticks)], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(title)


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if index < len(COLOURS) else "--"}


def _legend(axes: "Axes") -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        # The names of runs may be long paths: they must not press the axes to nothing.
        axes.legend(frameon=False, fontsize=8).set_in_layout(False)
