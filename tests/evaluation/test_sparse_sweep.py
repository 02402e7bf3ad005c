"""Lists of maskers at several budgets beside dense attention, in one evaluation."""

import csv
import json

import pytest
from PIL import Image

from flextok.config import compose
from flextok.evaluation.report import format_table
from flextok.evaluation.run import run
from tests.evaluation.networks import write_inception
from tests.support import export_small_model

QUICK = (
    *("evaluation.num_images=4", "evaluation.steps=2", "evaluation.device=cpu", "evaluation.keep_ks=[2,8]"),
    *("data=digits", "attention=sparse", "evaluation.budgets=[0.1,1]"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Two layers, and patches of one pixel: 64 of them.
    return export_small_model(tmp_path_factory.mktemp("model") / "export", "size.decoder_depth=2", "size.patch=1")


def evaluate(model, folder, *overrides):
    return run(compose([*QUICK, f"checkpoint={model}", f"output_dir={folder}", *overrides], "eval"))


def by_point(metrics):
    rows = metrics["results"]
    return {(row["keep_k"], row["maskers"], row["budget"]): {**row, "seconds_per_image": None} for row in rows}


def test_one_run_has_a_table_and_a_plot_of_all_lists_beside_dense(model, tmp_path):
    inception = write_inception(tmp_path / "inception.pt")
    network = ["evaluation/features=inception", f"evaluation.features.inception.path={inception}"]
    network.append(f"evaluation.reference_cache={tmp_path / 'references'}")
    metrics, folder = evaluate(model, tmp_path / "out", "evaluation.sparse=[sink_local,oracle_top_k,random]", *network)
    rows = by_point(metrics)
    lists = [("dense", 1.0), *((n, b) for n in ("sink_local", "oracle_top_k", "random") for b in (0.1, 1.0))]
    assert list(rows) == [(k, *found) for found in lists for k in (2, 8)]
    for (keep_k, _, budget), row in rows.items():
        same = row["psnr"] == pytest.approx(rows[keep_k, "dense", 1.0]["psnr"], abs=1e-6)
        assert same == (budget == 1.0)
        assert row["density"] == pytest.approx(1.0) if budget == 1.0 else 0.05 < row["density"] < 0.35
        assert row["fid_inception"] is not None
    # 64 patches and 8 registers, or 64, 2 and a mask token.
    assert rows[8, "oracle_top_k", 0.1]["density"] == pytest.approx(7 / 72)
    assert rows[2, "random", 0.1]["density"] == pytest.approx(6 / 67)
    assert Image.open(folder / "sparse.png").size[0] > 1000
    page = (folder / "report.html").read_text()
    assert "Sparse attention" in page
    header, *lines = format_table(metrics).splitlines()
    assert header.split()[:4] == ["keep_k", "maskers", "budget", "density"]
    assert lines[0].split()[:4] == ["2", "dense", "1", "1.000"]
    assert set(metrics["protocol"]["sparse"]) == {"sink_local", "oracle_top_k", "random"}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    with (folder / "metrics.csv").open() as file:
        assert {row["maskers"] for row in csv.DictReader(file)} == {"dense", "sink_local", "oracle_top_k", "random"}


@pytest.mark.slow
def test_batches_do_not_change_the_numbers_and_points_are_kept(model, tmp_path, caplog):
    lists = "evaluation.sparse=[oracle_top_k,random]"
    whole, _ = evaluate(model, tmp_path / "whole", lists, "evaluation.batch_size=4")
    single, _ = evaluate(model, tmp_path / "single", lists, "evaluation.batch_size=1")
    for point, row in by_point(whole).items():
        for name in ("psnr", "ssim", "density"):
            assert by_point(single)[point][name] == pytest.approx(row[name], abs=1e-5)
    caplog.set_level("INFO")
    more, _ = evaluate(model, tmp_path / "whole", lists, "evaluation.batch_size=4", "evaluation.budgets=[0.1,0.2,1]")
    assert "10 of 14 points were measured before" in caplog.text
    assert {point: row for point, row in by_point(more).items() if point[2] != 0.2} == by_point(whole)


def test_without_a_sweep_the_one_list_of_the_config_decodes(model, tmp_path):
    options = ["attention.maskers=[{type:OracleTopK,heavy_size:9}]", "evaluation.keep_ks=[8]"]
    metrics, folder = evaluate(model, tmp_path / "out", *options)
    (row,) = metrics["results"]
    assert row["density"] == pytest.approx(9 / 72)
    assert "maskers" not in row
    assert not (folder / "sparse.png").exists()
    assert metrics["protocol"]["sparse_attention"]["maskers"] == [{"type": "OracleTopK", "heavy_size": 9}]
    assert metrics["protocol"]["attention_backends"] == ["research", "sdpa"]


def test_a_list_of_ones_own_has_the_name_it_was_given(model, tmp_path):
    own = ["attention.name=mine", 'attention.maskers=[{type:OracleTopK,heavy_size:"${float:${attention.budget}}"}]']
    metrics, _ = evaluate(model, tmp_path / "out", *own, "evaluation.sparse=[mine,oracle_top_k]")
    rows = by_point(metrics)
    assert all(rows[k, "mine", b]["psnr"] == rows[k, "oracle_top_k", b]["psnr"] for k in (2, 8) for b in (0.1, 1.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.sparse=[nope]"], r"evaluation\.sparse=\['nope'\]: valid are null and some of hash, magicpig"),
        (["evaluation.sparse=[]"], r"evaluation\.sparse=\[\]: valid are null and some of"),
        (["evaluation.sparse=random", "attention=auto"], r"evaluation\.sparse='random'|needs the options of sparse"),
        (["evaluation.sparse=random", "attention.part=encoder"], "attention.part='encoder'; valid: decoder"),
        (
            ["evaluation.sparse=random", "evaluation.budgets=[0]"],
            r"evaluation\.budgets=\[0\]: valid are numbers above 0",
        ),
        (["evaluation.sparse=hash"], "attention.hash.file"),
        (["evaluation.sparse=random", "evaluation.backends=[sdpa,flex]"], "compare one of them at a time"),
        (["evaluation.sparse=random", "attention.layers=[5]"], r"attention\.layers: \[5\] do not exist"),
    ],
)
def test_impossible_sweeps_are_errors_before_data_is_read(model, tmp_path, overrides, message, monkeypatch):
    from omegaconf.errors import OmegaConfBaseException

    def read(*args):
        raise AssertionError("data was read")

    monkeypatch.setattr("flextok.evaluation.run.open_split", read)
    with pytest.raises((ValueError, OmegaConfBaseException), match=message):
        evaluate(model, tmp_path / "out", *overrides)
