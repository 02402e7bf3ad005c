"""Which of two models needs fewer tokens for the same quality? Differences image by image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flextok.evaluation.bootstrap import paired_bootstrap
from flextok.evaluation.evaluated import TARGET_AXES, Evaluated, Image


def length_differences(first: Evaluated, other: Evaluated, images: Sequence[Image], seed: int) -> list[dict[str, Any]]:
    """Mean differences in `tokens` and `bits` for each target that both have, with their intervals.

    An image that does not meet the target counts with all tokens of its model, as `flextok tokenize` stores it. Targets
    that two different networks measured are left out.
    """
    rows: list[dict[str, Any]] = []
    columns: list[NDArray[np.float64]] = []
    shared = [key for key in first.lengths if key in other.lengths and _same_network(first, other, key[0])]
    for key in shared:
        found = [run.lengths[key][run.places(images)] for run in (first, other)]
        tokens = [
            np.where(np.isnan(lengths), len(run.metrics["tokens"]["entropy_bits_per_position"]), lengths)
            for run, lengths in zip((first, other), found, strict=True)
        ]
        bits = [
            run.metrics["tokens"]["bits_per_token"] * each for run, each in zip((first, other), tokens, strict=True)
        ]
        failed = [float(np.isnan(lengths).mean()) for lengths in found]
        about = {"run": other.name, **dict(zip(TARGET_AXES, key, strict=True))}
        for unit, (before, after) in (("tokens", tokens), ("bits", bits)):
            means = {"baseline": float(before.mean()), "value": float(after.mean())}
            shares = {"baseline_not_met": failed[0], "not_met": failed[1]}
            # Without the last digits, which would say -0.00 of no difference.
            difference = round(float((after - before).mean()), 9) + 0.0
            rows.append({**about, "metric": unit, **means, **shares, "difference": difference})
            columns.append(after - before)
    if columns:
        limits = paired_bootstrap(np.stack(columns, axis=1), seed=seed)
        for row, low, high in zip(rows, *limits.tolist(), strict=True):
            row |= {"low": low, "high": high}
    return rows


def _same_network(first: Evaluated, other: Evaluated, target: str) -> bool:
    name = target.partition("=")[0]
    return _network(first, name) == _network(other, name)


def _network(run: Evaluated, name: str) -> Any:
    networks = run.metrics["protocol"]["networks"]
    about = networks.get(f"distances.{name}", networks.get(f"features.{name}", {}))
    return {key: about.get(key) for key in ("sha256", "extractor_sha256", "extractor_transform")}
