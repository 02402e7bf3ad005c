"""The study: its statistics on made-up results, its page, and a whole one in miniature."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.command import RESULTS
from benchmarks.study import __main__ as study
from benchmarks.study import analysis, figures, page, runs
from benchmarks.study.plan import PLAN, VARIANTS, DataSet, Plan, Run, Variant
from flextok.evaluation.evaluated import Evaluated
from tests.support import REPOSITORY

KEEP_KS = [1, 2]
IMAGES = 50
OVERRIDES = ("experiment=digits", "size.registers=2", "optimizer.warmup_steps=1", "data.batch_size=4")
MINIATURE = Plan(
    data=(DataSet("digits", OVERRIDES, max_steps=2, seeds=(0, 1)),),
    sampling_steps=(1, 2),
    num_images=4,
)


def made_up(path: Path) -> Evaluated:
    """Of each seed, attention masks are 1 dB better than mask tokens plus 0.1 dB times the seed."""
    variant, seed = path.parts[-2], int(path.name.removeprefix("seed_"))
    gain = (1 + 0.1 * seed) * (not variant.startswith("mask_token"))
    noise = np.random.default_rng(seed).normal(size=IMAGES)
    per_image = {
        (keep_k, steps, 1.0, None, None): {"psnr": 20 + keep_k + gain + noise, "ssim": 0.5 + 0 * noise}
        for keep_k in KEEP_KS
        for steps in PLAN.sampling_steps
    }
    tokens = {"entropy_bits_per_position": [3.0, 5.0 + seed], "entropy_ceiling_bits": 8.0, "codebook_usage": 0.25}
    protocol = {"keep_ks": KEEP_KS, "num_images": IMAGES}
    return Evaluated(
        name=str(path),
        folder=path,
        metrics={"protocol": protocol, "tokens": tokens},
        images=[(str(number), "sum") for number in range(IMAGES)],
        per_image=per_image,
        lengths={},
    )


@pytest.fixture
def made_up_studies(monkeypatch):
    monkeypatch.setattr(analysis, "read_evaluation", made_up)
    return analysis.analyse(PLAN, Path("runs/study"))


def test_intervals_are_students_t_over_the_seeds(made_up_studies):
    digits = made_up_studies[0]
    gains = 1 + 0.1 * np.array(digits["seeds"])
    expected = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    for objective in ("rectified_flow", "prefix_and_full"):
        for keep_k in (None, *KEEP_KS):
            row = find(digits, "mask_token", "attention_mask", objective, keep_k=keep_k)
            assert row["by_seed"] == pytest.approx(gains)
            assert (row["low"], row["high"]) == pytest.approx(tuple(expected))
            # The noise of an image is the same for both, so other images change nothing.
            assert (row["images_low"], row["images_high"]) == pytest.approx((gains.mean(), gains.mean()))
        same = find(digits, "attention_mask", "packed", objective, keep_k=None)
        assert (same["low"], same["high"]) == (0, 0)


def test_curves_are_means_over_seeds_and_images(made_up_studies):
    photos = made_up_studies[1]
    noise = [np.random.default_rng(seed).normal(size=IMAGES).mean() for seed in photos["seeds"]]
    (row,) = (
        row
        for row in photos["curves"]
        if (row["form"], row["objective"], row["steps"], row["metric"], row["keep_k"])
        == ("mask_token", "rectified_flow", 25, "psnr", 2)
    )
    assert row["mean"] == pytest.approx(22 + np.mean(noise))
    assert (row["low"], row["high"]) == pytest.approx(
        tuple(stats.ttest_1samp(22 + np.array(noise), 0).confidence_interval())
    )
    entropy = photos["tokens"][0]
    assert entropy["entropy_bits_per_position"] == [3.0, 6.0]
    assert entropy["mean_entropy"]["mean"] == 4.5


def test_runs_on_different_images_are_not_compared(monkeypatch):
    def other_images(path):
        evaluated = made_up(path)
        return replace(evaluated, images=[(path.name, "sum")] * IMAGES)

    monkeypatch.setattr(analysis, "read_evaluation", other_images)
    with pytest.raises(ValueError, match="digits were judged on different images"):
        analysis.analyse(PLAN, Path("runs/study"))


def test_the_page_shows_the_results_that_are_kept():
    content = json.loads((RESULTS / "study.json").read_text())
    text = (REPOSITORY / "docs/study.md").read_text()
    assert page.fill_in(text, content) == text
    assert [found["data"] for found in content["studies"]] == [data.name for data in PLAN.data]
    assert [found["max_steps"] for found in content["studies"]] == [data.max_steps for data in PLAN.data]


def test_a_page_without_a_place_for_a_table_is_refused():
    content = json.loads((RESULTS / "study.json").read_text())
    with pytest.raises(ValueError, match="has places for .*; the tables are .*digits curves"):
        page.fill_in("<!-- table: digits -->\n<!-- /table -->", content)


def test_pictures_are_drawn_from_the_results(made_up_studies):
    for made in made_up_studies:
        drawn = figures.draw(made)
        assert [len(axes.containers) for axes in drawn.axes[:3]] == [len(VARIANTS)] * 3
        assert len(drawn.axes[3].lines) == len(VARIANTS) + 1


def test_seeds_come_one_after_the_other():
    names = [(run.data.name, run.seed) for run in PLAN.runs()]
    assert names == sorted(names)
    assert len(PLAN.runs()) == 36
    assert all(len(data.seeds) >= 3 for data in PLAN.data)


def test_a_folder_of_another_plan_is_refused(tmp_path):
    runs.claim(MINIATURE, tmp_path)
    runs.claim(MINIATURE, tmp_path)
    with pytest.raises(ValueError, match=r"it holds runs of another plan, see .*plan.json; valid: another folder"):
        runs.claim(PLAN, tmp_path)


def test_a_run_that_fails_names_its_log(tmp_path):
    broken = replace(MINIATURE, data=(replace(MINIATURE.data[0], overrides=("experiment=none",)),))
    run = Run(broken.data[0], Variant("packed", "rectified_flow"), 0)
    with pytest.raises(RuntimeError, match=r"train.py experiment=none .* ended with \d+, see .*study.log"):
        runs.do(run, broken, tmp_path)
    assert "none" in (run.folder(tmp_path) / "study.log").read_text()


@pytest.mark.slow
def test_a_whole_study_in_miniature(tmp_path):
    out, text = tmp_path / "study.json", tmp_path / "docs" / "study.md"
    (tmp_path / "docs" / "images").mkdir(parents=True)
    names = ("curves", "differences", "steps", "tokens", "speed")
    text.write_text("".join(f"<!-- table: digits {name} -->\n<!-- /table -->\n" for name in names))
    arguments = ["--folder", str(tmp_path / "runs"), "--out", str(out), "--jobs", "2", "--repeats", "2"]
    study.main(arguments, plan=MINIATURE, page_path=text)
    content = json.loads(out.read_text())
    (digits,) = content["studies"]
    assert digits["num_images"] == 4
    assert digits["keep_ks"] == [1, 2]
    assert {(row["form"], row["objective"]) for row in digits["curves"]} == {tuple(variant) for variant in VARIANTS}
    # The same mathematics, and two steps are too few for rounding to grow.
    for objective in ("rectified_flow", "prefix_and_full"):
        row = find(digits, "attention_mask", "packed", objective, keep_k=None, steps=2)
        assert row["by_seed"] == pytest.approx([0, 0], abs=1e-3)
    rows = {(row["form"], row["objective"]): row for row in content["speed"]["digits"]}
    assert rows["mask_token", "rectified_flow"]["times_faster"] == 1.0
    assert rows["packed", "rectified_flow"]["saved_mebibytes"] < rows["mask_token", "rectified_flow"]["saved_mebibytes"]
    assert all(value > 0 for row in rows.values() for value in row["decoded_per_second"].values())
    assert (tmp_path / "docs" / "images" / "study_digits.png").stat().st_size > 10_000
    assert "attention_mask, prefix − mask_token, prefix" in text.read_text()
    # Again: nothing is trained.
    metrics = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}
    study.main([*arguments, "--only", "runs"], plan=MINIATURE, page_path=text)
    assert metrics == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}


def find(found, baseline, other, objective, *, keep_k, steps=25, metric="psnr"):
    wanted = (Variant(baseline, objective).name, Variant(other, objective).name, keep_k, steps, metric)
    keys = ("baseline", "other", "keep_k", "steps", "metric")
    return next(row for row in found["differences"] if tuple(row[key] for key in keys) == wanted)
