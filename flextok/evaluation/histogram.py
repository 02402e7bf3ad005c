"""Draw how many tokens images need."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flextok.evaluation.plot import BOUND, COLOURS, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More of them than that are drawn together.
MOST_BARS = 32


def histograms(measured: Mapping[str, tuple[Sequence[float], int]]) -> "Figure":
    """A panel for each label: of the tokens that images need (NaN: all are not enough), which are from 1 to `longest`.

    Args:
        measured: by label, the numbers of all images, and `longest`.
    """
    from matplotlib.ticker import MaxNLocator

    figure, all_axes = panels(len(measured))
    for axes, (label, (values, longest)) in zip(all_axes, measured.items(), strict=False):
        known = [value for value in values if not math.isnan(value)]
        width = math.ceil(longest / MOST_BARS)
        shares = [0.0] * math.ceil(longest / width)
        for value in known:
            shares[(int(value) - 1) // width] += 100 / len(values)
        starts = [0.5 + width * index for index in range(len(shares))]
        axes.bar(starts, shares, width=0.9 * width, align="edge", color=COLOURS[0])
        ticks = {tick: f"{tick:.0f}" for tick in MaxNLocator(8, integer=True).tick_values(1, longest)}
        ticks = {tick: text for tick, text in ticks.items() if 1 <= tick <= longest}
        end = 0.5 + width * len(shares)
        if len(known) < len(values):
            # Apart from the others, for it is no number of tokens.
            end += 2 * width
            rest = 100 * (len(values) - len(known)) / len(values)
            axes.bar(end - width, rest, width=0.9 * width, align="edge", color=BOUND)
            ticks = {tick: text for tick, text in ticks.items() if tick <= longest - 2 * width}
            ticks[end - 0.5 * width] = "not met"
        axes.set_xlim(0.5 - 0.5 * width, end + 0.5 * width)
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("tokens needed")
        axes.set_ylabel("images (%)")
    return figure
