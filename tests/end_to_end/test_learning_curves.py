"""The recipe of `experiment=digits` learns what it promises: every further token helps, whatever the seed.

    pytest -m slow tests/end_to_end/test_learning_curves.py

Both dropout forms get the same budget and three seeds. With FLEXTOK_RESULTS=<file>.json the curves are written there.
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support import python_output

FORMS = ("mask_token", "attention_mask")
SEEDS = (0, 1, 2)
MIN_GAIN_DB = 3.0
TOLERANCE_DB = 0.1


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_mean_curve_rises_with_the_number_of_tokens(form, tmp_path, capsys):
    result = learning_curves(form, tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\n{format_table(form, result)}\n")
    if "FLEXTOK_RESULTS" in os.environ:
        record(Path(os.environ["FLEXTOK_RESULTS"]), form, result)
    falls = {
        f"{fewer} to {more} tokens": round(after - before, 3)
        for (fewer, before), (more, after) in pairwise(zip(result["keep_k"], result["mean"], strict=True))
        if after < before - TOLERANCE_DB
    }
    assert not falls, f"{form}: PSNR falls by more than {TOLERANCE_DB} dB: {falls}"
    assert result["gain"] >= MIN_GAIN_DB, f"{form}: all tokens gain only {result['gain']:.2f} dB over one"


def learning_curves(form, folder, *overrides, seeds=SEEDS):
    """Train and evaluate once per seed, as on the command line; PSNR in dB on the test split, by `keep_k`."""
    start = time.monotonic()
    curves, num_images = {}, set()
    for seed in seeds:
        runs = folder / f"seed_{seed}"
        options = ("experiment=digits", f"dropout={form}", f"seed={seed}", f"paths.runs={runs}", *overrides)
        python_output("train.py", *options, threads=2, timeout=1800)
        python_output("eval.py", "checkpoint=latest", f"paths.runs={runs}", threads=2, timeout=600)
        (report,) = runs.rglob("metrics.json")
        metrics = json.loads(report.read_text())
        assert metrics["protocol"]["split"] == "test"
        num_images.add(metrics["protocol"]["num_images"])
        curves[seed] = {row["keep_k"]: row["psnr"] for row in metrics["results"]}
    keep_ks = sorted(curves[seeds[0]])
    mean = [sum(curve[keep_k] for curve in curves.values()) / len(curves) for keep_k in keep_ks]
    return {
        "command": f"python train.py experiment=digits dropout={form} seed=<seed>",
        "num_images": num_images.pop(),
        "keep_k": keep_ks,
        "psnr": {str(seed): [curve[keep_k] for keep_k in keep_ks] for seed, curve in curves.items()},
        "mean": mean,
        "gain": mean[-1] - mean[0],
        "seconds": time.monotonic() - start,
    }


def format_table(form, result):
    rows = {**{f"seed {seed}": values for seed, values in result["psnr"].items()}, "mean": result["mean"]}
    header = f"{form:<16}" + "".join(f"{keep_k:>8}" for keep_k in result["keep_k"]) + "    gain"
    lines = [
        f"{name:<16}" + "".join(f"{value:8.2f}" for value in [*values, values[-1] - values[0]])
        for name, values in rows.items()
    ]
    return "\n".join([header, *lines, f"PSNR in dB on {result['num_images']} images; {result['seconds']:.0f} s"])


def record(path, form, result):
    """Put one form into the file, leaving the other as it is."""
    results = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, form: result}, indent=1) + "\n")
