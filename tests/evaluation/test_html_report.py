"""The page of an evaluation: whole in itself, well-formed, and with everything that was measured."""

import json

import pyarrow.parquet as pq
import pytest

from flextok.evaluation import html, plot
from flextok.evaluation.judges import Judges
from tests.evaluation.pages import Page, read_page
from tests.evaluation.reports import write

HOSTILE = "<script>alert('&')</script>\udcff.png"


def test_the_page_holds_all_it_shows(tmp_path):
    metrics, file = write(tmp_path)
    page = read_page(file)
    for title in ("Results", "Rate and distortion", "Tokens", "Throughput", "Reconstructions", "Best and worst"):
        assert title in page.text
    assert f"{metrics['results'][1]['psnr']:.2f}" in page.text
    # Three figures, the grid, and four pairs each of the best and the worst.
    assert len(page.sources) == 3 + 1 + 2 * 4 * 2


def test_the_page_has_the_whole_protocol(tmp_path):
    metrics, file = write(tmp_path)
    text = read_page(file).text
    for name, value in metrics["protocol"].items():
        assert name in text
        if not isinstance(value, str | dict):
            assert json.dumps(value) in text


def test_names_of_files_are_text_and_nothing_else(tmp_path):
    _, file = write(tmp_path, keys=[HOSTILE, "b", "c", "d"], keep_ks=[4])
    page = read_page(file)
    assert "<script>alert('&')</script>\\udcff.png" in page.text
    assert "model <b>.safetensors" in page.text


def test_best_and_worst_are_those_at_most_tokens_of_each_curve(tmp_path):
    _, file = write(tmp_path, keep_ks=[1, 2], steps=[1, 3])
    text = read_page(file).text
    assert "2 tokens, 1 step" in text
    assert "2 tokens, 3 steps" in text
    assert "1 token, 1 step" not in text.partition("Best and worst")[2]
    rows = [row for row in pq.read_table(file.with_name("results.parquet")).to_pylist() if row["keep_k"] == 2]
    best = max(rows, key=lambda row: row["psnr"])
    worst = min(rows, key=lambda row: row["psnr"])
    shown = text.partition("Best and worst")[2]
    assert f"Best {best['psnr']:.2f} dB · {best['key']}" in shown
    assert f"Worst {worst['psnr']:.2f} dB · {worst['key']}" in shown


def test_what_is_missing_is_said(tmp_path):
    _, file = write(tmp_path, judges=Judges(missing={"distances.lpips": "no file <here>"}))
    assert "Missing: lpips, lpips_se: no file <here>" in read_page(file).text


def test_the_same_numbers_give_the_same_pictures(tmp_path):
    metrics, _ = write(tmp_path)
    files = {plot.as_svg(plot.rate_distortion(plot.curves_of(metrics["results"]), None, ["psnr"])) for _ in range(2)}
    assert len(files) == 1


def test_the_table_of_images_has_a_row_per_point_and_image(tmp_path):
    metrics, file = write(tmp_path, keep_ks=[1, 4], steps=[1, 2])
    rows = pq.read_table(file.with_name("results.parquet")).to_pylist()
    assert len(rows) == 4 * 6
    assert list(rows[0]) == [
        *("keep_k", "steps", "guidance_scale", "key", "image_sha256", "psnr", "ssim", "ms_ssim", "mae", "mse")
    ]
    assert [row["key"] for row in rows[:6]] == [f"image-{i}" for i in range(6)]
    for number, result in enumerate(metrics["results"]):
        of_point = rows[6 * number : 6 * number + 6]
        assert sum(row["psnr"] for row in of_point) / 6 == pytest.approx(result["psnr"])
        assert {row["steps"] for row in of_point} == {result["steps"]}
        assert all(row["ms_ssim"] is None for row in of_point)  # images of 8 pixels


def test_text_is_escaped_everywhere():
    parts = [
        html.section("<&>", html.paragraph("<&>")),
        html.table(["<&>"], [["<&>"]]),
        html.details("<&>", "", is_open=True),
        html.picture(b"", html.PNG, '"<&>'),
        html.settings_table({"<&>": "<&>", "nested": {"a": ["<&>"]}}),
    ]
    page = Page("".join(parts))
    assert page.text.count("<&>") == 8
