"""Read what an evaluation left behind, for a comparison: `metrics.json`, `results.parquet` and `lengths.parquet`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flextok.evaluation.grid import Curve

FILES = ("metrics.json", "results.parquet")
LENGTHS = "lengths.parquet"
AXES = ("keep_k", *Curve._fields)
TARGET_AXES = ("target", *Curve._fields)
PointKey = tuple[Any, ...]
"""The values of `AXES` or of `TARGET_AXES`, None for those that were not compared."""
Image = tuple[str, str]
"""Key and sum of an image."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation: its `metrics.json`, and for each point and metric the numbers `[N]` of its N images.

    `lengths` are the tokens `[N]` that its images need for a target, NaN where all are not enough.
    """

    name: str
    folder: Path
    metrics: dict[str, Any]
    images: list[Image]
    per_image: dict[PointKey, dict[str, NDArray[np.float64]]]
    lengths: dict[PointKey, NDArray[np.float64]]

    def places(self, images: Sequence[Image]) -> list[int]:
        """Where these images are among its own."""
        known = {image: place for place, image in enumerate(self.images)}
        return [known[image] for image in images]


def read_evaluation(path: Path) -> Evaluated:
    """The evaluation in a folder, or in `evaluation` inside of it.

    Raises:
        ValueError: there is none, it is of a version that wrote no `results.parquet`, or a file is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    folder = next((f for f in (path, path / "evaluation") if (f / FILES[0]).is_file()), None)
    if folder is None:
        raise ValueError(f"{path}: holds no metrics.json; valid: a run or an export that eval.py has judged")
    if not (folder / FILES[1]).is_file():
        raise ValueError(f"{folder}: holds no results.parquet; evaluate again with this version")
    try:
        metrics = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        table = parquet.read_table(folder / FILES[1])
        points = [point_key(row) for row in metrics["results"]]
        count = metrics["protocol"]["num_images"]
        if table.num_rows != count * len(points):
            raise ValueError(f"{table.num_rows} rows for {len(points)} points of {count} images")
        names = zip(*(table.column(name).to_pylist() for name in ("key", "image_sha256")), strict=True)
        images = list(names)
        if images != images[:count] * len(points):
            raise ValueError("the points are of different images")
        known = [name for name in table.column_names if name not in (*AXES, "key", "image_sha256")]
        # What is unknown becomes NaN.
        columns = {name: table.column(name).to_numpy().reshape(len(points), count) for name in known}
        targets = [row for row in metrics.get("targets", ()) if "missing" not in row]
        lengths = _read_lengths(folder / LENGTHS, targets, images[:count]) if targets else {}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{folder}: what eval.py wrote cannot be read ({error!r}); evaluate again") from error
    per_image = {point: {name: columns[name][row] for name in known} for row, point in enumerate(points)}
    return Evaluated(
        name=str(path), folder=folder, metrics=metrics, images=images[:count], per_image=per_image, lengths=lengths
    )


def _read_lengths(
    file: Path, targets: Sequence[dict[str, Any]], images: Sequence[Image]
) -> dict[PointKey, NDArray[np.float64]]:
    from pyarrow import parquet

    table = parquet.read_table(file)
    names = zip(*(table.column(name).to_pylist() for name in ("key", "image_sha256")), strict=True)
    if list(names) != list(images) * len(targets):
        raise ValueError(f"{file.name} is of other images or targets than metrics.json")
    # What is unknown becomes NaN.
    found = table.column("tokens").to_numpy().astype(np.float64).reshape(len(targets), len(images))
    return {tuple(row.get(name) for name in TARGET_AXES): found[place] for place, row in enumerate(targets)}


def point_key(row: dict[str, Any]) -> PointKey:
    """Which point a row of the results is."""
    return tuple(row.get(name) for name in AXES)
