"""What the trained models show: curves, differences of variants, entropy of the tokens.

The unit that varies is the training: intervals are Student's t over the seeds, of differences that are paired by seed
(equal data order, equal draws, equal initial weights but for the mask token). A second interval, the paired bootstrap
over images of the difference averaged over seeds, says what other images could change. Both are 95 %.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.plan import FORMS, OBJECTIVES, VARIANTS, DataSet, Plan, Run, Variant
from flextok.evaluation.bootstrap import CONFIDENCE, paired_bootstrap
from flextok.evaluation.evaluated import Evaluated, read_evaluation

METRICS = ("psnr", "ssim")
# Baseline, and what is set against it.
COMPARISONS = [
    *((Variant("mask_token", objective), Variant("attention_mask", objective)) for objective in OBJECTIVES),
    *((Variant("attention_mask", objective), Variant("packed", objective)) for objective in OBJECTIVES),
    *((Variant(form, "rectified_flow"), Variant(form, "prefix_and_full")) for form in FORMS),
]
# `[seeds, keep_ks, images]` by variant.
Scores = Mapping[Variant, NDArray[np.float64]]


def analyse(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """One entry per data set; every run of the plan has to be there."""
    return [_analyse(plan, data, folder) for data in plan.data]


def _analyse(plan: Plan, data: DataSet, folder: Path) -> dict[str, Any]:
    found = {
        variant: [read_evaluation(Run(data, variant, seed).folder(folder)) for seed in data.seeds]
        for variant in VARIANTS
    }
    everything = [evaluated for of_variant in found.values() for evaluated in of_variant]
    if any(evaluated.images != everything[0].images for evaluated in everything):
        raise ValueError(f"{folder}: the runs on {data.name} were judged on different images")
    protocol = everything[0].metrics["protocol"]
    curves, differences = [], []
    for steps in plan.sampling_steps:
        for metric in METRICS:
            scores = {variant: _scores(runs, protocol["keep_ks"], steps, metric) for variant, runs in found.items()}
            about = {"steps": steps, "metric": metric}
            curves += [about | row for row in _curves(scores, protocol["keep_ks"])]
            differences += [about | row for row in _differences(scores, protocol["keep_ks"])]
    return {
        "data": data.name,
        "max_steps": data.max_steps,
        "seeds": list(data.seeds),
        "overrides": list(data.overrides),
        "num_images": protocol["num_images"],
        "keep_ks": protocol["keep_ks"],
        "curves": curves,
        "differences": differences,
        "tokens": [{**_names(variant), **_tokens(runs)} for variant, runs in found.items()],
    }


def _scores(runs: Sequence[Evaluated], keep_ks: Sequence[int], steps: int, metric: str) -> NDArray[np.float64]:
    def of(run: Evaluated, keep_k: int) -> NDArray[np.float64]:
        (point,) = (point for point in run.per_image if point[:2] == (keep_k, steps))
        return run.per_image[point][metric]

    return np.stack([[of(run, keep_k) for keep_k in keep_ks] for run in runs])


def _curves(scores: Scores, keep_ks: Sequence[int]) -> list[dict[str, Any]]:
    """Means over seeds and images with their intervals; `keep_k` is None in the row of the mean over all of them."""
    return [
        {**_names(variant), "keep_k": keep_k, **_interval(values.mean(axis=1))}
        for variant, array in scores.items()
        for keep_k, values in _by_keep_k(array, keep_ks)
    ]


def _differences(scores: Scores, keep_ks: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for baseline, other in COMPARISONS:
        for keep_k, values in _by_keep_k(scores[other] - scores[baseline], keep_ks):
            low, high = paired_bootstrap(values.mean(axis=0)[:, None], seed=0)[:, 0].tolist()
            about = {"baseline": baseline.name, "other": other.name, "keep_k": keep_k}
            seeds = {"by_seed": values.mean(axis=1).tolist()}
            rows.append({**about, **_interval(values.mean(axis=1)), "images_low": low, "images_high": high, **seeds})
    return rows


def _by_keep_k(array: NDArray[np.float64], keep_ks: Sequence[int]) -> list[tuple[int | None, NDArray[np.float64]]]:
    """`[seeds, images]` of each number of tokens, and of the mean over all of them."""
    return [(None, array.mean(axis=1)), *((keep_k, array[:, place]) for place, keep_k in enumerate(keep_ks))]


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    """The mean of some values, one per seed, and Student's interval for it."""
    from scipy import stats

    error = values.std(ddof=1) / np.sqrt(len(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * error)
    mean = float(values.mean())
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def _tokens(runs: Sequence[Evaluated]) -> dict[str, Any]:
    """Of the tokens of the test split, the mean over the seeds."""
    statistics = [run.metrics["tokens"] for run in runs]
    positions = np.array([found["entropy_bits_per_position"] for found in statistics])
    return {
        "entropy_bits_per_position": positions.mean(axis=0).tolist(),
        "entropy_ceiling_bits": statistics[0]["entropy_ceiling_bits"],
        "mean_entropy": _interval(positions.mean(axis=1)),
        "codebook_usage": float(np.mean([found["codebook_usage"] for found in statistics])),
    }


def _names(variant: Variant) -> dict[str, str]:
    return {"form": variant.form, "objective": variant.objective}
