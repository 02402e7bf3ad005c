"""How many tokens images need, in an evaluation: what trying all numbers finds, and what is made of it."""

import json
import math

import pyarrow.parquet as pq
import pytest

from flextok.evaluation import lengths as lengths_module
from flextok.evaluation.grid import Curve
from flextok.evaluation.judges import Judges
from flextok.evaluation.lengths import Search, summarize_lengths
from flextok.evaluation.points import PointNumbers
from flextok.evaluation.report import format_table
from flextok.evaluation.targets import Target
from tests.evaluation.pages import read_page
from tests.evaluation.reports import write
from tests.evaluation.stub import StubTokenizer, random_batches, run_sweep
from tests.support import Interruptions, Killed

CURVE = Curve(2, 1.0)
POOLED = {"pooled": {"_target_": "tests.evaluation.networks.Pooled"}}
ALL = {"keep_ks": [1, 2, 3, 4]}


def sweep(folder=None, batch_size=4, **options):
    return run_sweep(StubTokenizer(), random_batches(9, batch_size), {"targets": "psnr=10.4", **options}, folder=folder)


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def summary(tokens, pixels=None):
    per_image = {"tokens": tokens, "pixels": pixels or [64.0] * len(tokens)}
    numbers = PointNumbers(per_image=per_image, of_sets={}, seconds_per_image=None, attention_backends=[])
    return summarize_lengths(Search(Target("psnr", 20.0), CURVE, 16), numbers, 2.0, None)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_it_is_what_trying_all_numbers_finds():
    result = sweep(**ALL)
    psnrs = zip(*(numbers.per_image["psnr"] for numbers in result.numbers), strict=True)
    (numbers,) = result.lengths
    found = numbers.per_image["tokens"]
    assert len({length for length in found if not math.isnan(length)}) > 2
    for length, (psnr, of_image) in zip(found, enumerate(psnrs), strict=True):
        if math.isnan(length):
            assert of_image[3] < 10.4
        else:
            assert of_image[int(length) - 1] >= 10.4, psnr
            assert length == 1 or of_image[int(length) - 2] < 10.4


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_the_batch_size_changes_nothing(batch_size):
    assert sweep(batch_size=batch_size).targets == sweep().targets


def test_each_target_has_a_row_for_each_curve():
    result = sweep(targets=["psnr=10.4", "ssim=0.5", "psnr=10.40"], steps=[1, 3], guidance_scale=[1, 2])
    rows = [(row["target"], row["steps"], row["guidance_scale"]) for row in result.targets]
    assert rows == [(t, steps, g) for t in ("psnr=10.4", "ssim=0.5") for steps in (1, 3) for g in (1.0, 2.0)]


def test_points_are_not_changed_by_targets():
    with_targets, without = (
        [{**row, "seconds_per_image": 0} for row in sweep(targets=targets).results] for targets in ("psnr=10.4", None)
    )
    assert with_targets == without


# --- what is made of it -----------------------------------------------------------------------------------------------


def test_means_are_of_those_that_meet_it_and_shares_of_all():
    row = summary([4.0, 1.0, math.nan, 2.0, 5.0])
    assert row["tokens"] == 3.0
    assert row["tokens_se"] == pytest.approx(math.sqrt((1 + 4 + 1 + 4) / 3 / 4))
    assert row["bits_per_image"] == 6.0
    assert row["bits_per_pixel"] == 6.0 / 64
    assert row["not_met"] == 0.2
    assert [row[f"tokens_{name}"] for name in ("p10", "p25", "median", "p75", "p90")] == [1, 2, 4, 5, None]


def test_a_share_is_of_whole_images():
    row = summary([float(number) for number in range(10, 0, -1)])
    assert [row[f"tokens_{name}"] for name in ("p10", "p25", "median", "p75", "p90")] == [1, 3, 5, 8, 9]
    assert row["not_met"] == 0.0


def test_bits_per_pixel_are_a_mean_over_images():
    assert summary([2.0, 4.0], [4.0, 16.0])["bits_per_pixel"] == (1.0 + 0.5) / 2


def test_where_no_image_meets_it_there_is_no_mean():
    row = summary([math.nan] * 3)
    assert row["not_met"] == 1.0
    assert {row[name] for name in row if name.startswith(("tokens", "bits"))} == {None}
    json.dumps(row, allow_nan=False)
    assert summary([3.0])["tokens_se"] is None


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_a_search_goes_on_after_an_interruption(tmp_path, monkeypatch):
    options = {"targets": ["psnr=10.4", "ssim=0.5"], "keep_ks": [4]}
    expected = sweep(**options)
    interruptions = Interruptions(monkeypatch)
    interruptions.calls_left = 4
    # Three batches are a target.
    interruptions.may_strike(lengths_module, "tokens_needed")
    with pytest.raises(Killed):
        sweep(tmp_path, **options)
    before = stamps(tmp_path)
    assert len(before) == 2
    interruptions.calls_left = 3
    assert sweep(tmp_path, **options).targets == expected.targets
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 3


def test_targets_can_be_added_later_and_measure_nothing_again(tmp_path):
    sweep(tmp_path, targets=None)
    before = stamps(tmp_path)
    result = sweep(tmp_path, targets=["psnr=10.4"])
    assert result.targets == sweep().targets
    assert before.items() <= stamps(tmp_path).items()


def test_a_damaged_search_is_done_again_and_said(tmp_path, caplog):
    expected = sweep(tmp_path).targets
    (file,) = tmp_path.rglob("target_*.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    assert sweep(tmp_path).targets == expected
    assert f"{file} is damaged" in caplog.text


# --- networks ---------------------------------------------------------------------------------------------------------


def test_a_network_that_is_missing_is_said_and_everything_else_is_there(tmp_path):
    options = {"targets": ["lpips=0.2", "psnr=10.4"], "distances": {"lpips": {"_target_": "x.Y"}}}
    judges = Judges(missing={"distances.lpips": "no file <here>"})
    metrics, file = write(tmp_path, judges=judges, **options)
    lpips, psnr = metrics["targets"]
    assert lpips["missing"] == "no file <here>"
    assert lpips["tokens"] is lpips["not_met"] is None
    assert psnr["tokens"] is not None
    assert "lpips=0.2 is missing: no file <here>" in read_page(file).text
    assert "lpips=0.2, 2 steps: not measured" in format_table(metrics)
    assert set(pq.read_table(file.with_name("lengths.parquet"))["target"].to_pylist()) == {"psnr=10.4"}


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_has_tables_and_histograms(tmp_path):
    options = {"targets": ["psnr=10.4", "pooled=0.7"], "features": POOLED, "reference_cache": str(tmp_path / "cache")}
    metrics, file = write(tmp_path, **options)
    assert metrics["protocol"]["targets"] == ["psnr=10.4", "pooled=0.7"]
    page = read_page(file)
    assert "Tokens an image needs" in page.text
    for row in metrics["targets"]:
        assert f"{row['target']} {row['tokens']:.2f} {row['bits_per_image']:.1f}" in page.text
        assert f"{row['target']}, 2 steps: {row['tokens']:.1f} tokens per image" in format_table(metrics)
    rows = pq.read_table(file.with_name("lengths.parquet")).to_pylist()
    assert len(rows) == 2 * 6
    assert list(rows[0]) == [
        *("target", "steps", "guidance_scale", "key", "image_sha256", "tokens", "bits", "bits_per_pixel")
    ]
    for number, row in enumerate(metrics["targets"]):
        found = [image["tokens"] for image in rows[6 * number : 6 * number + 6]]
        known = [tokens for tokens in found if tokens is not None]
        assert row["tokens"] == pytest.approx(sum(known) / len(known))
        assert row["not_met"] == pytest.approx(found.count(None) / 6)
    bits = metrics["tokens"]["bits_per_token"]
    for row in rows:
        assert (row["tokens"] is None) == (row["bits"] is None) == (row["bits_per_pixel"] is None)
        assert row["tokens"] is None or row["bits"] == row["tokens"] * bits == row["bits_per_pixel"] * 64


def test_without_targets_nothing_is_left_of_earlier_ones(tmp_path):
    _, file = write(tmp_path, targets="psnr=10.4")
    assert file.with_name("lengths.parquet").exists()
    metrics, file = write(tmp_path)
    assert metrics["targets"] == []
    assert not file.with_name("lengths.parquet").exists()
    assert "Tokens an image needs" not in read_page(file).text
