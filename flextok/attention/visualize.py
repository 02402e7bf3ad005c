"""Look at any mask: a few chosen positions as text, all of them as a picture.

A mask is a bool matrix `[length, length]`, True where a query (row) attends to a key (column). Segments are spans
`(start, end)`, end not included: texts, or sub-sequences of a packed row with the registers split at `keep_k`.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

ATTENDS, HIDDEN = "■", "·"
LEGEND = f"{ATTENDS} = attends, {HIDDEN} = does not; S# = start, E# = last token of segment #; G0 = first fused token"

Segments = Sequence[Sequence[int]]

_ALLOWED, _BLOCKED, _BORDER, _FUSION = "#1f4e79", "#f4f4f4", "#888888", "#c44e52"


def render_mask(mask: Tensor, segments: Segments = (), fusion_start: int | None = None, budget: int = 25) -> str:
    """The mask at `sample_positions` as lines of text: label, position, one cell per column; then a legend.

    ValueError for a mask that is no square bool matrix, and for segments or `fusion_start` outside it.
    """
    _check_mask(mask)
    positions = sample_positions(len(mask), segments, fusion_start, budget)
    labels = [_label(position, segments, fusion_start) for position in positions]
    numbers = [str(position) for position in positions]
    cells = [[ATTENDS if allowed else HIDDEN for allowed in row] for row in mask[positions][:, positions].tolist()]

    width = max(map(len, [*labels, *numbers]))
    rows = [
        ["", "", *labels],
        ["", "", *numbers],
        *map(list.__add__, map(list, zip(labels, numbers, strict=True)), cells),
    ]
    lines = [" ".join(cell.rjust(width) for cell in row).rstrip() for row in rows]
    return "\n".join([*lines, LEGEND])


def save_mask_png(
    mask: Tensor,
    path: str | Path,
    segments: Segments = (),
    fusion_start: int | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    dpi: int = 150,
) -> Path:
    """Write the whole mask as a PNG, dark where a query attends; returns `path`.

    Args:
        path: folders on the way to it are made.
        names: of the segments, shown behind their numbers S1, S2, ...
    """
    # Without pyplot there is no global state and no display: a bare Figure draws with Agg.
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    _check_mask(mask)
    _check_places(len(mask), segments, fusion_start)
    if names is not None and len(names) != len(segments):
        raise ValueError(f"names has {len(names)} entries; valid: one for each of the {len(segments)} segments")
    numbers = [f"S{number}" for number in range(1, len(segments) + 1)]
    long_names = numbers if names is None else [f"{number} {name}" for number, name in zip(numbers, names, strict=True)]

    figure = Figure(figsize=(6, 6), layout="compressed")
    axes = figure.subplots()
    axes.imshow(mask.cpu().numpy(), cmap=ListedColormap([_BLOCKED, _ALLOWED]), vmin=0, vmax=1)
    for border in sorted({border for segment in segments for border in segment} - {0, len(mask)}):
        axes.axhline(border - 0.5, color=_BORDER, linewidth=0.6)
        axes.axvline(border - 0.5, color=_BORDER, linewidth=0.6)
    if fusion_start is not None:
        axes.axhline(fusion_start - 0.5, color=_FUSION, linewidth=1.2, label=f"joined from {fusion_start} on")
        axes.axvline(fusion_start - 0.5, color=_FUSION, linewidth=1.2)
        figure.legend(loc="outside lower right", frameon=False, fontsize=8)
    middles = [(start + end - 1) / 2 for start, end in segments]
    above, beside = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
    above.set_xticks(middles, numbers)
    beside.set_yticks(middles, long_names)
    for labels in (above, beside):
        labels.tick_params(length=0, labelsize=8)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(title, fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=dpi, format="png", bbox_inches="tight")
    return temporary.replace(path)


def sample_positions(length: int, segments: Segments, fusion_start: int | None = None, budget: int = 25) -> list[int]:
    """At most `budget` of `length` positions, those that say most about the mask, ascending.

    In this order: `fusion_start`; first and last token of each segment; their thirds; the four tokens after
    `fusion_start`; the last position; middles of the widest gaps. Positions that no longer fit are thinned out evenly.
    """
    if budget < 1:
        raise ValueError(f"budget={budget}; valid: 1 position or more")
    _check_places(length, segments, fusion_start)
    if length <= budget:
        return list(range(length))
    chosen: set[int] = set()
    for candidates in _by_priority(length, segments, fusion_start):
        fresh = sorted({position for position in candidates if position < length} - chosen)
        chosen.update(_evenly(fresh, budget - len(chosen)))
    while len(chosen) < budget:
        chosen.add(_middle_of_widest_gap(sorted(chosen)))
    return sorted(chosen)


def _by_priority(length: int, segments: Segments, fusion_start: int | None) -> Iterator[Iterable[int]]:
    if fusion_start is not None:
        yield [fusion_start]
    yield [position for start, end in segments for position in (start, end - 1)]
    yield [start + (end - start) * j // 3 for start, end in segments if end - start > 4 for j in (1, 2)]
    if fusion_start is not None:
        yield range(fusion_start + 1, fusion_start + 5)
    yield [length - 1]


def _evenly(items: list[int], room: int) -> list[int]:
    """All of `items` if there is room, else `room` of them, from the first to the last in even steps."""
    if len(items) <= room:
        return items
    if room < 2:
        return items[:room]
    return [items[int(i * (len(items) - 1) / (room - 1) + 0.5)] for i in range(room)]


def _middle_of_widest_gap(positions: list[int]) -> int:
    # The row may begin before the first position; it never ends after the last.
    lefts = [-1, *positions]
    start = max(range(len(positions)), key=lambda i: (positions[i] - lefts[i], -i))
    return (lefts[start] + positions[start]) // 2


def _label(position: int, segments: Segments, fusion_start: int | None) -> str:
    if position == fusion_start:
        return "G0"
    starts = [f"S{number}" for number, (start, _) in enumerate(segments, 1) if start == position]
    ends = [f"E{number}" for number, (_, end) in enumerate(segments, 1) if end - 1 == position]
    return next(iter(starts + ends), "")


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] != mask.shape[1] or len(mask) == 0:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; valid: torch.bool [length, length], not empty")


def _check_places(length: int, segments: Segments, fusion_start: int | None) -> None:
    for number, (start, end) in enumerate(segments):
        if not 0 <= start < end <= length:
            raise ValueError(f"segments[{number}]={(start, end)}; valid: 0 <= start < end <= length {length}")
    if fusion_start is not None and not 0 <= fusion_start <= length:
        raise ValueError(f"fusion_start={fusion_start}; valid: 0 to {length}, the length")
