"""A real tokenizer through `eval.py`, from every kind of source, and the promises of a sweep kept by it."""

import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from flextok.config import compose
from flextok.evaluation.report import format_table
from flextok.evaluation.run import run
from flextok.evaluation.settings import EvaluationSettings
from tests.evaluation.networks import write_inception
from tests.evaluation.stub import SETTINGS, random_batches, run_sweep
from tests.support import REPOSITORY

FILES = {"grid.png", "metrics.csv", "metrics.json", "points", "rate_distortion.png", "report.html", "results.parquet"}
QUICK = ("evaluation.num_images=3", "evaluation.steps=2", "evaluation.device=cpu", "evaluation.keep_ks=[2,16]")


@pytest.fixture
def run_folder(model, config, tmp_path):
    """A run with an average whose weights differ from the trained ones."""
    folder = tmp_path / "runs" / "digits" / "now"
    (folder / "checkpoints").mkdir(parents=True)
    config = OmegaConf.merge(config, {"paths": {"run": str(folder)}})
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    average = {name: tensor * 0.5 for name, tensor in weights.items() if tensor.is_floating_point()}
    checkpoint = {"state_dict": weights, "ema": {"weights": average}}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


def evaluate(*overrides):
    return run(compose([*QUICK, *overrides], "eval"))


def numbers(metrics):
    rows = [{**row, "seconds_per_image": None} for row in metrics["results"]]
    return {"results": rows, "vae": metrics["vae"], "tokens": metrics["tokens"]}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_neither_batch_size_nor_order_changes_the_numbers(model, guidance_scale):
    settings = EvaluationSettings.from_mapping({**SETTINGS, "keep_ks": [1, 5, 16], "guidance_scale": guidance_scale})
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    tables = []
    for batches in (random_batches(8, 1), random_batches(8, 7), random_batches(8, 3, order=order)):
        result = run_sweep(model, batches, settings)
        tables.append([[row[name] for name in ("psnr", "ssim", "mae", "mse")] for row in result.results])
        tokens = result.encoded.tokens
        assert tokens["codes_used"] > 1
    expected = torch.tensor(tables[0], dtype=torch.float64)
    assert len({tuple(row) for row in tables[0]}) == 3, "keep_k changes nothing: this test would prove nothing"
    for table in tables[1:]:
        torch.testing.assert_close(torch.tensor(table, dtype=torch.float64), expected, rtol=0, atol=1e-5)


def networks(teacher_folder, folder):
    """Overrides for a DINOv2, an Inception and a module, all tiny, with a cache of their own."""
    return (
        "evaluation/features=[inception,dinov2]",
        f"evaluation.features.inception.path={write_inception(folder / 'inception.pt')}",
        f"evaluation.features.dinov2.path={teacher_folder}",
        "evaluation.features.dinov2.image_size=16",
        "+evaluation.features.mine={_target_: tests.evaluation.networks.Pooled}",
        "+evaluation.distances.largest={_target_: tests.evaluation.networks.LargestDifference}",
        f"paths.cache={folder / 'cache'}",
    )


def test_two_evaluations_at_different_batch_sizes_give_the_same_numbers(export, teacher_folder, tmp_path):
    fixed = (f"checkpoint={export}", "data=digits", "evaluation.num_images=40", f"output_dir={tmp_path / 'out'}")
    given = networks(teacher_folder, tmp_path)
    found = [
        evaluate(*fixed, *given, f"evaluation.batch_size={size}", f"paths.cache={tmp_path / str(size)}")[0]
        for size in (40, 7)
    ]
    names = [f"{kind}_{name}" for kind in ("fid", "kid") for name in ("inception", "dinov2", "mine")]
    for ours, theirs in zip(*(numbers(metrics)["results"] for metrics in found), strict=True):
        assert ours == {name: pytest.approx(value, abs=1e-5) for name, value in theirs.items()}
        assert all(ours[name] is not None for name in (*names, "largest"))
    first, second = (metrics["protocol"] | {"batch_size": None, "data": None} for metrics in found)
    assert first == second


def test_the_protocol_says_all_that_a_number_depends_on(export, teacher_folder, tmp_path):
    given = (f"checkpoint={export}", "data=digits", f"output_dir={tmp_path / 'out'}")
    metrics, folder = evaluate(*given, *networks(teacher_folder, tmp_path), "evaluation.num_images=40")
    protocol = json.loads((folder / "metrics.json").read_text())["protocol"]
    assert protocol["split"] == "test"
    assert protocol["num_images"] == 40
    assert protocol["transform"].startswith("8 x 8 pixels")
    assert set(protocol["features"]) == {"inception", "dinov2", "mine"}
    assert protocol["features"]["dinov2"]["image_size"] == 16
    assert protocol["kid_subset_size"] == 1000
    known = protocol["networks"]["features.dinov2"]
    assert known["num_features"] == 16
    assert known["covariance_is_singular"] is False
    assert known["references"] == {
        "images_sha256": protocol["images_sha256"],
        "num_images": 40,
        "sample_size": 10_000,
    }
    assert len(known["extractor_sha256"]) == len(protocol["images_sha256"]) == 64
    assert "16 x 16" in known["extractor_transform"]
    names = {"steps", "guidance_scale", "weights", "seed", "weights_sha256", "git_revision", "import_references"}
    assert names <= protocol.keys()
    assert set(protocol["networks"]) == {"features.inception", "features.dinov2", "features.mine", "distances.largest"}


def test_missing_weights_are_said_in_the_table_and_everything_else_is_reported(export, tmp_path):
    given = ("data=digits", "evaluation/features=inception", "evaluation/distances=lpips", "paths.weights=nowhere")
    metrics, _ = evaluate(f"checkpoint={export}", f"output_dir={tmp_path}", *given)
    text = format_table(metrics)
    for file in ("inception-2015-12-05.pt", "alexnet-owt-7be5be79.pth"):
        assert f"nowhere/{file} does not exist; put https://" in text
        assert any(file in known["missing"] for known in metrics["protocol"]["networks"].values())
    assert all(row["psnr"] is not None and row["fid_inception"] is None for row in metrics["results"])


def test_eval_py_reports_on_an_exported_model(export, tmp_path):
    command = [sys.executable, "eval.py", f"checkpoint={export}", "data=digits", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run([*command, *QUICK], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["keep_k"] for row in metrics["results"]] == [2, 16]
    assert metrics["protocol"]["weights"] == "as exported"
    assert metrics["protocol"]["num_images"] == 3
    assert metrics["protocol"]["data"]["_target_"].endswith("DigitsDataModule")
    assert "PSNR" in done.stdout


def test_eval_py_reports_a_mistake_on_one_line_and_exits_with_two():
    done = subprocess.run(
        [sys.executable, "eval.py", "checkpoint=latest", "evaluation.steps=0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "error: evaluation.steps=0" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_bare_file_gives_the_numbers_of_its_folder(export, tmp_path):
    folder, _ = evaluate(f"checkpoint={export}", "data=digits", f"output_dir={tmp_path / 'a'}")
    file, _ = evaluate(f"checkpoint={export / 'model.safetensors'}", "data=digits", f"output_dir={tmp_path / 'b'}")
    assert numbers(file) == numbers(folder)


def test_a_file_without_a_run_needs_a_data_group(export):
    with pytest.raises(ValueError, match="data=null.*choose a data group"):
        evaluate(f"checkpoint={export}")


def test_a_run_brings_its_data_and_keeps_the_report(run_folder):
    metrics, folder = evaluate("checkpoint=latest", f"paths.runs={run_folder.parents[1]}")
    assert folder == run_folder / "evaluation"
    assert {path.name for path in folder.iterdir()} == FILES
    assert metrics["protocol"]["data"]["_target_"].endswith("DigitsDataModule")
    assert metrics["protocol"]["weights_file"] == "last.ckpt"


def test_ema_and_raw_weights_are_told_apart(run_folder, export, tmp_path):
    ema, _ = evaluate(f"checkpoint={run_folder}")
    raw, _ = evaluate(f"checkpoint={run_folder}/checkpoints/last.ckpt", "evaluation.weights=raw")
    exported, _ = evaluate(f"checkpoint={export}", "data=digits", f"output_dir={tmp_path / 'export'}")
    assert [m["protocol"]["weights"] for m in (ema, raw, exported)] == ["ema", "raw", "as exported"]
    # An export pads its packed rows, which moves the last bits.
    for mine, theirs in zip(raw["results"], exported["results"], strict=True):
        assert mine["psnr"] == pytest.approx(theirs["psnr"], abs=1e-5)
    assert numbers(ema) != numbers(raw)


def test_one_option_of_the_data_of_a_run_can_be_changed(run_folder):
    metrics, _ = evaluate(f"checkpoint={run_folder}", "+data.num_workers=0", "evaluation.split=val")
    assert metrics["protocol"]["data"]["num_workers"] == 0
    assert metrics["protocol"]["data"]["image_size"] == 8
    assert metrics["protocol"]["split"] == "val"


def test_a_run_without_an_average_is_said_to_have_raw_weights(run_folder):
    file = run_folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["ema"]
    torch.save(checkpoint, file)
    assert evaluate(f"checkpoint={run_folder}")[0]["protocol"]["weights"] == "raw"


@pytest.mark.parametrize("evaluation", ["default", "quick", "guided"])
def test_every_evaluation_config_composes(evaluation):
    node = compose([f"evaluation={evaluation}"], "eval").evaluation
    EvaluationSettings.from_mapping(OmegaConf.to_container(node, resolve=True))


SAMPLING = {
    "sampler": ("heun", "heun"),
    "timestep_shift": ("3", 3.0),
    "guidance_interval": ("[0.6,1]", [0.6, 1.0]),
    "guidance_every": ("2", 2),
}


@pytest.mark.parametrize(("option", "text", "recorded"), [(name, *value) for name, value in SAMPLING.items()])
def test_each_option_of_sampling_changes_the_numbers_and_is_in_the_protocol(export, tmp_path, option, text, recorded):
    fixed = (f"checkpoint={export}", "data=digits", "evaluation.guidance_scale=3.0", f"output_dir={tmp_path}")
    default, _ = evaluate(*fixed)
    changed, _ = evaluate(*fixed, f"evaluation.{option}={text}")
    assert changed["protocol"] == {**default["protocol"], option: recorded}
    assert json.loads((tmp_path / "metrics.json").read_text())["protocol"][option] == recorded
    assert numbers(changed)["results"] != numbers(default)["results"]
    assert default["protocol"][option] != recorded


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"evaluation.device='{device}'"):
        evaluate("checkpoint=latest", f"evaluation.device={device}")
