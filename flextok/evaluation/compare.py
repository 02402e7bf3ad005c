"""Set evaluations of the same images against each other: mean differences, and how sure they are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flextok.evaluation.bootstrap import CONFIDENCE, RESAMPLES, paired_bootstrap
from flextok.evaluation.compare_lengths import length_differences
from flextok.evaluation.evaluated import AXES, Evaluated, Image, point_key
from flextok.utils.checkpoint import atomic_path

# Of the protocol: texts that say how a number is defined, and what follows from something else that is listed.
_NOT_COMPARED = ("metrics", "num_images_requested", "weights_file")


def compare(runs: Sequence[Evaluated], *, seed: int = 0) -> dict[str, Any]:
    """Differences of all runs to the first, at the points that both have, over the images that all have.

    Raises:
        ValueError: fewer than two runs, or they are of different images.
    """
    if len(runs) < 2 or len({run.folder.resolve() for run in runs}) < len(runs):
        raise ValueError("RUN: a comparison needs two different evaluations or more")
    images = _common_images(runs)
    first = runs[0]
    differences = [row for other in runs[1:] for row in _differences(first, other, images, seed)]
    notes = [
        f"{run.name} has {len(run.images)} images, of which {len(images)} are compared"
        for run in runs
        if len(run.images) > len(images)
    ]
    for other in runs[1:]:
        if not first.per_image.keys() & other.per_image.keys():
            notes.append(f"{other.name} has no point (keep_k, steps, guidance, ...) in common with {first.name}")
    return {
        "baseline": first.name,
        "runs": [{"name": run.name, **_summary(run)} for run in runs],
        "num_images": len(images),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": seed,
        "differences": differences,
        "targets": [row for other in runs[1:] for row in length_differences(first, other, images, seed)],
        "notes": notes,
        "protocols_differ_in": protocol_differences(runs),
    }


def _common_images(runs: Sequence[Evaluated]) -> list[Image]:
    common = set(runs[0].images).intersection(*(run.images for run in runs[1:]))
    known = {key for key, _ in common}
    for run in runs[1:]:
        same_name = {key for key, _ in runs[0].images} & {key for key, _ in run.images}
        if same_name - known:
            raise ValueError(
                f"{runs[0].name} and {run.name} have judged different images: {min(same_name - known)!r} has other "
                "pixels in one than in the other; valid: the same files at the same data.image_size"
            )
    if len(common) < 2:
        raise ValueError(
            f"{' and '.join(run.name for run in runs)} have {len(common)} images in common; valid: evaluations of the "
            "same split of the same data, at least two images"
        )
    return sorted(common)


def _differences(first: Evaluated, other: Evaluated, images: Sequence[Image], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    columns = []
    places = [run.places(images) for run in (first, other)]
    for point in (point for point in first.per_image if point in other.per_image):
        ours, theirs = first.per_image[point], other.per_image[point]
        about = {"run": other.name, **dict(zip(AXES, point, strict=True))}
        for name in (name for name in ours if name in theirs):
            before, after = ours[name][places[0]], theirs[name][places[1]]
            if np.isfinite(before).all() and np.isfinite(after).all():
                means = {"baseline": float(before.mean()), "value": float(after.mean())}
                rows.append({**about, "metric": name, **means, "difference": float((after - before).mean())})
                columns.append(after - before)
    if columns:
        limits = paired_bootstrap(np.stack(columns, axis=1), seed=seed)
        for row, low, high in zip(rows, *limits.tolist(), strict=True):
            row |= {"low": low, "high": high}
    return rows + _differences_of_sets(first, other)


def _differences_of_sets(first: Evaluated, other: Evaluated) -> list[dict[str, Any]]:
    """Distances of sets have no numbers of single images, so there is no interval; only those that can be compared."""
    ours, theirs = first.metrics, other.metrics
    if ours["protocol"]["images_sha256"] != theirs["protocol"]["images_sha256"]:
        return []
    networks = [metrics["protocol"]["networks"] for metrics in (ours, theirs)]
    same = {
        place.removeprefix("features.")
        for place, known in networks[0].items()
        if place.startswith("features.") and "missing" not in known and networks[1].get(place) == known
    }
    rows = []
    by_point = {point_key(row): row for row in theirs["results"]}
    for row in ours["results"]:
        found = by_point.get(point_key(row))
        for name in (f"{kind}_{network}" for network in sorted(same) for kind in ("fid", "kid")):
            if found is not None:
                about = {"run": other.name, **{axis: row.get(axis) for axis in AXES}, "metric": name}
                values = {"baseline": row[name], "value": found[name], "difference": found[name] - row[name]}
                rows.append({**about, **values, "low": None, "high": None})
    return rows


def protocol_differences(runs: Sequence[Evaluated]) -> dict[str, list[Any]]:
    """Settings, nested ones with dots, that are not the same in all protocols: the value of each run."""
    protocols = [dict(_flat(run.metrics["protocol"])) for run in runs]
    names = list(dict.fromkeys(name for protocol in protocols for name in protocol))
    values = {name: [protocol.get(name) for protocol in protocols] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found[1:])}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if prefix or name not in _NOT_COMPARED:
            nested = isinstance(value, Mapping) and value
            pairs += _flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
    return pairs


def _summary(run: Evaluated) -> dict[str, Any]:
    names = ("checkpoint", "weights", "weights_sha256", "num_images", "git_revision")
    return {name: run.metrics["protocol"].get(name) for name in names}


def write_json(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the comparison, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(comparison, indent=2, allow_nan=False) + "\n", encoding="utf-8")
