"""The pictures of the study, one per data set, drawn from its JSON."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.study.plan import OBJECTIVES, VARIANTS, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"mask_token": "#1f4e79", "attention_mask": "#d95f02", "packed": "#1b9e77"}
LINES = dict(zip(OBJECTIVES, ("-", "--"), strict=True))
Rows = Sequence[Mapping[str, Any]]


def draw(study: Mapping[str, Any]) -> "Figure":
    """Curves of PSNR at the most and the fewest steps, PSNR over the steps, and the entropy of each position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, 2).flat)
    rows = [row for row in study["curves"] if row["metric"] == "psnr"]
    sampling_steps = sorted({row["steps"] for row in rows})
    for axes, steps in zip(panels, (sampling_steps[-1], sampling_steps[0]), strict=False):
        curves = [row for row in rows if row["steps"] == steps and row["keep_k"] is not None]
        _lines(axes, curves, lambda row: row["keep_k"])
        _logarithmic(axes, study["keep_ks"])
        axes.set(title=f"{steps} sampling step{'s' if steps > 1 else ''}", xlabel="tokens kept", ylabel="PSNR (dB)")
    _lines(panels[2], [row for row in rows if row["keep_k"] is None], lambda row: row["steps"])
    _logarithmic(panels[2], sampling_steps)
    panels[2].set(title="mean over the numbers of tokens", xlabel="sampling steps", ylabel="PSNR (dB)")
    for row in study["tokens"]:
        entropy = row["entropy_bits_per_position"]
        variant = Variant(row["form"], row["objective"])
        panels[3].plot(range(1, len(entropy) + 1), entropy, label=variant.label, **_style(variant))
    panels[3].axhline(study["tokens"][0]["entropy_ceiling_bits"], linestyle=":", linewidth=1, color="#888888")
    panels[3].set(title="entropy of the ids", xlabel="position of the token", ylabel="bits")
    panels[3].set_ylim(bottom=0)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[3].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    seeds = len(study["seeds"])
    figure.suptitle(f"{study['data']}: mean of {seeds} trainings per variant; bars: 95 % over the trainings")
    return figure


def _lines(axes: "Axes", rows: Rows, place: Callable[[Mapping[str, Any]], float]) -> None:
    for number, variant in enumerate(VARIANTS):
        found = [row for row in rows if (row["form"], row["objective"]) == tuple(variant)]
        # Side by side, so that the bars can be told from each other.
        places = [place(row) * 1.02 ** (number - (len(VARIANTS) - 1) / 2) for row in found]
        errors = [row["high"] - row["mean"] for row in found]
        means = [row["mean"] for row in found]
        axes.errorbar(places, means, yerr=errors, marker="o", markersize=3, capsize=2, **_style(variant))


def _logarithmic(axes: "Axes", ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _style(variant: Variant) -> dict[str, Any]:
    return {"color": COLOURS[variant.form], "linestyle": LINES[variant.objective], "linewidth": 1.2}
