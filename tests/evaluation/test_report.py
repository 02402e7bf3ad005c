"""The files of a report: their schema, their pictures, and that none of them is ever half written."""

import csv
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from flextok.evaluation.judges import NO_JUDGES
from flextok.evaluation.protocol import build_protocol
from flextok.evaluation.report import format_table, write_report
from flextok.evaluation.settings import EvaluationSettings
from flextok.pictures import image_grid, save_image, tile_size
from tests.evaluation.stub import SETTINGS, StubTokenizer, random_batches, run_sweep

DIGITS = {"_target_": "flextok.data.digits.DigitsDataModule"}
FILES = ["grid.png", "metrics.csv", "metrics.json", "rate_distortion.png", "report.html", "results.parquet"]


@pytest.fixture
def report(tmp_path):
    settings = EvaluationSettings.from_mapping(SETTINGS)
    sweep = run_sweep(StubTokenizer(), random_batches(6, 4), settings)
    weights = tmp_path / "model.safetensors"
    protocol = build_protocol(
        encoded=sweep.encoded,
        keep_ks=[1, 2, 4],
        judges=NO_JUDGES,
        settings=settings,
        data=DIGITS,
        checkpoint=weights,
        weights_file=weights,
        weights="as exported",
        model=StubTokenizer(),
        device=torch.device("cpu"),
        attention_backend="auto",
    )
    return write_report(sweep, protocol, tmp_path / "evaluation"), tmp_path / "evaluation"


def test_a_report_is_six_files(report):
    assert sorted(path.name for path in report[1].iterdir()) == FILES


def test_metrics_json_has_the_schema(report):
    metrics = json.loads((report[1] / "metrics.json").read_text())
    assert metrics == report[0]
    assert list(metrics) == ["protocol", "results", "vae", "tokens", "targets"]
    assert [row["keep_k"] for row in metrics["results"]] == [1, 2, 4]
    for row in metrics["results"]:
        assert {"psnr", "psnr_se", "ssim", "mae", "mse", "bits_per_image", "seconds_per_image"} <= row.keys()
    assert {"psnr", "ssim", "mae", "mse"} <= metrics["vae"].keys()
    assert {"codebook_usage", "perplexity", "entropy_bits_per_position", "note"} <= metrics["tokens"].keys()


def test_the_protocol_says_how_the_numbers_came_about(report):
    protocol = report[0]["protocol"]
    assert protocol["num_images"] == 6
    assert protocol["image_sizes"] == [[8, 8]]
    assert protocol["keep_ks"] == [1, 2, 4]
    assert protocol["data"] == DIGITS
    # Its one weight is a zero.
    assert protocol["weights_sha256"] == hashlib.sha256(b"weight" + bytes(4)).hexdigest()
    assert protocol["versions"]["torch"].startswith("2.")
    assert (protocol["device"], protocol["dtype"]) == ("cpu", "float32")
    assert protocol["metrics"]["ssim_windows"] == [5]
    assert protocol["git_revision"] is None or len(protocol["git_revision"].removesuffix("-dirty")) == 40


def test_csv_has_one_line_per_keep_k(report):
    with (report[1] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["keep_k"]) for row in rows] == [1, 2, 4]
    assert float(rows[0]["psnr"]) == report[0]["results"][0]["psnr"]


def test_the_table_has_one_line_per_keep_k_and_the_vae(report):
    lines = format_table(report[0]).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["1", "2", "4", "VAE"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert "6 images" in lines[5]


def test_the_table_shows_the_metrics_that_were_asked_for_and_says_what_is_missing(report):
    metrics = json.loads(json.dumps(report[0]))
    metrics["protocol"]["distances"] = {"lpips": {}}
    for row in (*metrics["results"], metrics["vae"]):
        row |= {"fid_dinov2": 3.14159, "kid_dinov2": 0.01, "kid_dinov2_se": 0.001, "lpips": None, "lpips_se": None}
        row["missing"] = "lpips, lpips_se: there is no file"
    header, *lines = format_table(metrics).splitlines()
    assert header.split()[-2:] == ["fid_dinov2", "kid_dinov2"]
    assert all(line.split()[-2:] == ["3.142", "0.01000"] for line in lines[:4])
    assert lines[-1] == "missing: lpips, lpips_se: there is no file"


def test_the_grid_holds_a_tile_per_row_and_image(report):
    with Image.open(report[1] / "grid.png") as picture:
        # Original, VAE and three keep_k, three tiles of 64 pixels each, gaps of 4, margins of 12.
        assert picture.height == 5 * 64 + 4 * 4 + 2 * 12
        assert picture.width > 3 * 64 + 2 * 4 + 12


def test_small_images_are_enlarged_exactly(tmp_path):
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    save_image(image_grid({"original": image}), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        tile = np.asarray(picture)[12 : 12 + 64, -12 - 64 : -12]
    expected = ((image[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(tile[::8, ::8], expected)
    assert np.array_equal(tile[7::8, 7::8], expected)


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [
        (8, 8, (64, 64)),
        (64, 64, (64, 64)),
        (63, 63, (126, 126)),
        (256, 256, (256, 256)),
        (512, 256, (128, 256)),
    ],
)
def test_tile_sizes(height, width, tile):
    assert tile_size(height, width) == tile


@pytest.mark.parametrize("rows", [{}, {"a": torch.zeros(1, 3, 8, 8), "b": torch.zeros(2, 3, 8, 8)}])
def test_rows_of_a_grid_share_one_shape(rows, tmp_path):
    with pytest.raises(ValueError, match="one shape"):
        image_grid(rows)


def test_numbers_that_are_no_json_leave_no_metrics(report, tmp_path):
    sweep = run_sweep(StubTokenizer(), random_batches(2, 2), {})
    with pytest.raises(ValueError, match="JSON"):
        write_report(sweep, {**report[0]["protocol"], "num_images": float("nan")}, tmp_path / "no")
    assert sorted(path.name for path in (tmp_path / "no").iterdir()) == [n for n in FILES if n != "metrics.json"]
