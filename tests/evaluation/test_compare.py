"""Differences between evaluations: right to the last digit where they are known, refused where there is no sense."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

from flextok.cli import main
from flextok.evaluation import bootstrap
from flextok.evaluation.bootstrap import paired_bootstrap
from flextok.evaluation.compare import compare
from flextok.evaluation.evaluated import read_evaluation
from flextok.evaluation.html_compare import difference_text, format_comparison, write_comparison
from tests.evaluation.pages import read_page
from tests.evaluation.reports import write

# --- bootstrap --------------------------------------------------------------------------------------------------------


def sample(count, columns=1, seed=0):
    return np.random.default_rng(seed).normal(0.3, 2.0, size=(count, columns))


def test_the_interval_of_many_images_is_that_of_the_normal_distribution():
    differences = sample(2000)
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(len(differences))
    low, high = paired_bootstrap(differences, seed=0)[:, 0]
    assert low == pytest.approx(mean - 1.96 * error, abs=0.06 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.06 * error)


def test_the_interval_of_two_images_is_known():
    """Means are 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4."""
    assert paired_bootstrap(np.array([[0.0, 5.0], [1.0, 5.0]]), seed=0).tolist() == [[0.0, 5.0], [1.0, 5.0]]


@pytest.mark.parametrize("count", [10, 100])
def test_it_is_the_percentile_bootstrap_of_scipy(count):
    before, after = sample(count, seed=1)[:, 0], sample(count, seed=2)[:, 0] ** 2
    theirs = scipy.stats.bootstrap(
        (before, after),
        lambda x, y, axis: (y - x).mean(axis=axis),
        **{"paired": True, "n_resamples": 10_000, "method": "percentile", "confidence_level": 0.95},
        random_state=np.random.default_rng(5),
    )
    ours = paired_bootstrap((after - before)[:, None], seed=0)[:, 0]
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours == pytest.approx(theirs.confidence_interval, abs=0.04 * width)


def test_the_seed_decides_and_columns_and_chunks_do_not(monkeypatch):
    differences = sample(50, columns=3)
    together = paired_bootstrap(differences, seed=3)
    alone = [paired_bootstrap(differences[:, [column]], seed=3)[:, 0] for column in range(3)]
    np.testing.assert_allclose(together, np.stack(alone, axis=1), rtol=1e-12)
    monkeypatch.setattr(bootstrap, "_ROOM", 700)
    np.testing.assert_allclose(paired_bootstrap(differences, seed=3), together, rtol=1e-12)
    assert not np.array_equal(paired_bootstrap(differences, seed=4), together)


@pytest.mark.parametrize("differences", [np.zeros((1, 2)), np.zeros((0, 2)), np.array([[0.0], [np.nan]])])
def test_what_has_no_interval_is_refused(differences):
    with pytest.raises(ValueError, match="at least two|not finite"):
        paired_bootstrap(differences, seed=0)


# --- comparisons ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Two evaluations of the same images, which differ in seed and grid."""
    write(tmp_path / "a", keep_ks=[1, 2, 4])
    write(tmp_path / "b", keep_ks=[1, 4], steps=[2, 3], seed=1)
    return [tmp_path / name / "out" for name in ("a", "b")]


@pytest.fixture
def runs(folders):
    return [read_evaluation(folder) for folder in folders]


def test_differences_are_those_of_the_tables(runs, folders):
    comparison = compare(runs)
    ours, theirs = (pq.read_table(folder / "results.parquet").to_pylist() for folder in folders)
    assert {(row["keep_k"], row["steps"]) for row in comparison["differences"]} == {(1, 2), (4, 2)}
    for row in comparison["differences"]:
        mine, other = (
            {r["key"]: r[row["metric"]] for r in rows if (r["keep_k"], r["steps"]) == (row["keep_k"], row["steps"])}
            for rows in (ours, theirs)
        )
        pairs = [other[key] - mine[key] for key in mine]
        assert row["difference"] == pytest.approx(sum(pairs) / 6)
        assert row["value"] - row["baseline"] == pytest.approx(row["difference"])
        assert min(pairs) <= row["low"] <= row["difference"] <= row["high"] <= max(pairs)
    # All tokens are kept: nothing is drawn.
    assert all(row["low"] == row["high"] == 0 for row in comparison["differences"] if row["keep_k"] == 4)
    assert any(row["low"] < row["high"] for row in comparison["differences"] if row["keep_k"] == 1)
    assert {row["metric"] for row in comparison["differences"]} == {"psnr", "ssim", "mae", "mse"}
    assert comparison["protocols_differ_in"]["seed"] == [0, 1]
    assert comparison["protocols_differ_in"]["steps"] == [[2], [2, 3]]
    assert comparison == compare(runs)


def test_only_images_that_all_have_are_compared(runs):
    fewer = replace(
        runs[1],
        images=runs[1].images[2:],
        per_image={point: {n: v[2:] for n, v in found.items()} for point, found in runs[1].per_image.items()},
    )
    comparison = compare([runs[0], fewer])
    assert comparison["num_images"] == 4
    assert comparison["notes"] == [f"{runs[0].name} has 6 images, of which 4 are compared"]
    psnr = next(row for row in comparison["differences"] if (row["keep_k"], row["metric"]) == (1, "psnr"))
    point = next(iter(runs[0].per_image))
    pairs = (run.per_image[point]["psnr"][2:] for run in runs)
    assert psnr["difference"] == pytest.approx(float(np.subtract(*reversed(list(pairs))).mean()))


def test_other_images_are_refused(runs):
    renamed = replace(runs[1], images=[(f"other {key}", content) for key, content in runs[1].images])
    with pytest.raises(ValueError, match="have 0 images in common; valid: evaluations of the same split"):
        compare([runs[0], renamed])
    changed = replace(runs[1], images=[(runs[1].images[0][0], "0" * 64), *runs[1].images[1:]])
    with pytest.raises(ValueError, match="have judged different images: 'image-0' has other pixels"):
        compare([runs[0], changed])


def test_one_evaluation_alone_is_no_comparison(runs):
    for given in (runs[:1], [runs[0], runs[0]]):
        with pytest.raises(ValueError, match="two different evaluations or more"):
            compare(given)


def test_distances_of_sets_are_compared_without_interval_where_the_networks_are_the_same(tmp_path):
    features = {"pooled": {"_target_": "tests.evaluation.networks.Pooled"}}
    other = {"pooled": {"_target_": "tests.evaluation.networks.Pooled", "gain": 2.0}}
    runs = []
    for name, seed, given in (("a", 0, features), ("b", 1, features), ("c", 0, other)):
        write(tmp_path / name, features=given, seed=seed, keep_ks=[1], reference_cache=str(tmp_path / "cache"))
        runs.append(read_evaluation(tmp_path / name / "out"))
    rows = [row for row in compare(runs)["differences"] if "pooled" in row["metric"]]
    assert [(row["run"], row["metric"]) for row in rows] == [(runs[1].name, "fid_pooled"), (runs[1].name, "kid_pooled")]
    values = [run.metrics["results"][0]["fid_pooled"] for run in runs]
    assert rows[0]["difference"] == pytest.approx(values[1] - values[0])
    assert rows[0]["low"] is rows[0]["high"] is None


@pytest.mark.parametrize(
    ("difference", "low", "high", "text"),
    [
        (0.4213, 0.311, 0.532, "+0.42 [+0.31, +0.53]"),
        (-12.5, -13.0, -11.0, "-12.50 [-13.00, -11.00]"),
        (0.00042, -0.0001, 0.00051, "+0.00042 [-0.00010, +0.00051]"),
        (1.5, None, None, "+1.50"),
        (0.0, 0.0, 0.0, "+0.00 [+0.00, +0.00]"),
    ],
)
def test_differences_as_text(difference, low, high, text):
    assert difference_text({"difference": difference, "low": low, "high": high}) == text


def test_lengths_are_compared_image_by_image(tmp_path):
    options = {"keep_ks": [1, 4], "targets": ["psnr=10.4", "ssim=0.99"]}
    write(tmp_path / "a", **options)
    write(tmp_path / "b", **{**options, "seed": 1, "targets": ["ssim=0.99", "psnr=10.4", "psnr=9"]})
    runs = [read_evaluation(tmp_path / name / "out") for name in ("a", "b")]
    comparison = compare(runs)
    rows = {(row["target"], row["metric"]): row for row in comparison["targets"]}
    assert list(rows) == [(target, unit) for target in ("psnr=10.4", "ssim=0.99") for unit in ("tokens", "bits")]
    tables = [pq.read_table(run.folder / "lengths.parquet").to_pylist() for run in runs]
    of_both = [{row["key"]: row["tokens"] for row in table if row["target"] == "psnr=10.4"} for table in tables]
    # All four tokens are counted where they are not enough.
    pairs = [((one[key] or 4), (other[key] or 4)) for one, other in [of_both] for key in one]
    row = rows["psnr=10.4", "tokens"]
    assert row["difference"] == pytest.approx(sum(b - a for a, b in pairs) / 6)
    assert row["baseline_not_met"] == pytest.approx(list(of_both[0].values()).count(None) / 6)
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["low"] < row["high"]
    bits = runs[0].metrics["tokens"]["bits_per_token"]
    assert rows["psnr=10.4", "bits"]["difference"] == pytest.approx(row["difference"] * bits)
    # No image is that good.
    assert rows["ssim=0.99", "tokens"]["value"] == 4.0
    assert rows["ssim=0.99", "tokens"]["not_met"] == 1.0
    write_comparison(comparison, runs, tmp_path / "page.html")
    for text in (read_page(tmp_path / "page.html").text, format_comparison(comparison)):
        assert difference_text(row) in text
        assert "ssim=0.99, 2 steps" in text


def test_targets_of_different_networks_are_not_compared(tmp_path):
    for name, gain in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        pooled = {"_target_": "tests.evaluation.networks.Pooled", "gain": gain}
        cache = str(tmp_path / "cache")
        write(tmp_path / name, keep_ks=[4], targets="pooled=0.7", features={"pooled": pooled}, reference_cache=cache)
    a, b, c = (read_evaluation(tmp_path / name / "out") for name in ("a", "b", "c"))
    assert compare([a, b])["targets"] == []
    assert [row["difference"] for row in compare([a, c])["targets"]] == [0.0, 0.0]


@pytest.mark.parametrize("content", [None, b"PAR1", "fewer"])
def test_lengths_that_cannot_be_read_are_an_error(content, tmp_path):
    write(tmp_path, targets="psnr=10.4")
    file = tmp_path / "out" / "lengths.parquet"
    if content == "fewer":
        pq.write_table(pq.read_table(file).slice(1), file)
    elif content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"what eval\.py wrote cannot be read .*lengths\.parquet"):
        read_evaluation(tmp_path / "out")


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_a_page_and_json(folders, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, folders), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    comparison = json.loads(out.with_suffix(".json").read_text())
    assert comparison == compare([read_evaluation(folder) for folder in folders])
    assert format_comparison(comparison) in printed
    assert "the protocols differ in: keep_ks, steps, seed, checkpoint\n" in printed
    page = read_page(out)
    row = comparison["differences"][0]
    assert difference_text(row) in page.text
    assert difference_text(row) in printed
    for title in ("Runs", "Rate and distortion", "Differences", "What the protocols differ in", "Protocols"):
        assert title in page.text
    assert len(page.sources) == 4 + 2  # figures, and the grids of both


def test_a_run_stands_for_the_evaluation_in_it(folders, tmp_path):
    folders[0].rename(tmp_path / "a" / "evaluation")
    assert read_evaluation(tmp_path / "a").folder == tmp_path / "a" / "evaluation"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", None, "holds no metrics.json; valid: a run or an export"),
        ("results.parquet", None, "holds no results.parquet; evaluate again"),
        ("metrics.json", "{", "cannot be read"),
        ("metrics.json", '{"protocol": {"num_images": 5}, "results": []}', "cannot be read"),
        ("results.parquet", "PAR1", "cannot be read"),
    ],
)
def test_a_folder_without_an_evaluation_is_an_error_of_one_line(file, content, message, folders, capsys):
    if content is None:
        (folders[1] / file).unlink()
    else:
        (folders[1] / file).write_text(content)
    assert main(["compare", *map(str, folders), "--out", str(folders[0] / "page.html")]) == 1
    error = capsys.readouterr().err
    assert str(folders[1]) in error
    assert message in error


def test_the_page_has_a_name_for_a_page(folders, capsys):
    assert main(["compare", *map(str, folders), "--out", "page.json"]) == 1
    assert "--out page.json: valid is a name that ends in .html" in capsys.readouterr().err
