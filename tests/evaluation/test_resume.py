"""However a sweep is interrupted or divided, its files are those of one that ran through in one process."""

import json
import signal

import pytest

from flextok.evaluation import sweep as sweep_module
from tests.evaluation.networks import FUSE
from tests.evaluation.processes import evaluate
from tests.evaluation.stub import StubTokenizer, random_batches, run_sweep
from tests.support import Interruptions, Killed, python_output

GRID = {"keep_ks": [1, 4], "steps": [1, 2]}
NETWORKS = (
    "+evaluation.distances.fuse={_target_: tests.evaluation.networks.Fuse}",
    "+evaluation.features.pooled={_target_: tests.evaluation.networks.Pooled}",
)
SWEEP = (
    *("data=digits", "evaluation.num_images=21", "evaluation.batch_size=4", "evaluation.device=cpu"),
    *("evaluation.keep_ks=[2,16]", "evaluation.steps=[1,2]", "++data.num_workers=0", *NETWORKS),
    "evaluation.targets=['fuse=0.84','psnr=6.2','pooled=0.9']",
)
# Of 21 images in batches of 4, which the VAE goes through first.
BATCHES = 6


def sweep(folder, **options):
    return run_sweep(StubTokenizer(), random_batches(9, 4), {**GRID, **options}, folder=folder)


def timeless(results):
    return [{name: value for name, value in row.items() if name != "seconds_per_image"} for row in results]


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", range(0, 12, 3))
def test_a_sweep_goes_on_after_any_interruption(calls, tmp_path, monkeypatch):
    expected = sweep(tmp_path / "whole")
    interruptions = Interruptions(monkeypatch)
    interruptions.calls_left = calls
    interruptions.may_strike(sweep_module, "decode_tokens")
    with pytest.raises(Killed):
        sweep(tmp_path / "parts")
    before = stamps(tmp_path / "parts")
    assert len(before) == calls // 3  # Three batches are a point.
    interruptions.calls_left = 12 - 3 * len(before)
    result = sweep(tmp_path / "parts")
    assert timeless(result.results) == timeless(expected.results)
    after = stamps(tmp_path / "parts")
    assert {name: after[name] for name in before} == before
    assert len(after) == 4


def test_a_sweep_that_is_extended_measures_the_new_points_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    sweep(tmp_path / "parts", keep_ks=[1])
    before = stamps(tmp_path / "parts")
    result = sweep(tmp_path / "parts")
    assert "2 of 4 points were measured before" in caplog.text
    assert timeless(result.results) == timeless(sweep(tmp_path / "whole").results)
    after = stamps(tmp_path / "parts")
    assert {name: after[name] for name in before} == before


def test_all_points_can_be_measured_again(tmp_path, monkeypatch):
    sweep(tmp_path)
    monkeypatch.setattr(sweep_module.PointStore, "has", None)
    before = stamps(tmp_path)
    sweep(tmp_path, resume=False)
    assert all(stamps(tmp_path)[name] > before[name] for name in before)


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"PAR1", None])
def test_a_damaged_point_is_measured_again_and_said(suffix, content, tmp_path, caplog):
    expected = timeless(sweep(tmp_path).results)
    damaged = sorted(tmp_path.rglob(f"*.{suffix}"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-20] if content is None else content)
    assert timeless(sweep(tmp_path).results) == expected
    assert f"{damaged} is damaged" in caplog.text
    assert "it is measured again" in caplog.text
    caplog.clear()
    sweep(tmp_path)
    assert caplog.text == ""


def test_points_of_other_images_are_not_taken(tmp_path, caplog):
    sweep(tmp_path)
    run_sweep(StubTokenizer(), random_batches(8, 4), GRID, folder=tmp_path)
    assert "it is of other images" in caplog.text


# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(export, tmp_path_factory):
    """The files of a sweep that one process made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert evaluate(folder, *SWEEP, *of(export, folder)) == [0]
    return folder


def of(export, folder):
    return f"checkpoint={export}", f"output_dir={folder / 'out'}", f"paths.cache={folder / 'cache'}"


def assert_same_files(folder, expected, digits=None):
    for name in ("results.parquet", "lengths.parquet"):
        ours, theirs = (path / "out" / name for path in (folder, expected))
        assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (json.loads((path / "out" / "metrics.json").read_text()) for path in (folder, expected))
    for metrics in (ours, theirs):
        for row in metrics["results"]:
            del row["seconds_per_image"]
    if digits is not None:
        # Means over sets are sums in another order.
        for metrics in (ours, theirs):
            for row in [*metrics["results"], metrics["vae"]]:
                row |= {name: round(row[name], digits) for name in row if "pooled" in name and row[name] is not None}
    assert ours == theirs
    assert (folder / "out" / "grid.png").read_bytes() == (expected / "out" / "grid.png").read_bytes()


@pytest.mark.fault("kill -9 of an evaluation")
# The fifth is the search for the first target.
@pytest.mark.parametrize("point", [1, *(pytest.param(point, marks=pytest.mark.slow) for point in (0, 4))])
def test_a_killed_sweep_gives_the_files_of_one_that_was_not(point, export, undisturbed, tmp_path):
    sweep = (*SWEEP, *of(export, tmp_path))
    fuse = {FUSE: str(BATCHES * (1 + point) + 3)}
    assert evaluate(tmp_path, *sweep, **fuse) == [-signal.SIGKILL]
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert len(stamps(tmp_path / "out")) == point
    assert evaluate(tmp_path, *sweep) == [0]
    assert_same_files(tmp_path, undisturbed)


def test_two_processes_give_the_files_of_one(export, undisturbed, tmp_path):
    assert evaluate(tmp_path, *SWEEP, *of(export, tmp_path), world_size=2) == [0, 0]
    assert_same_files(tmp_path, undisturbed, digits=9)


def test_one_process_goes_on_with_what_two_began(export, undisturbed, tmp_path):
    sweep = (*SWEEP, *of(export, tmp_path))
    codes = evaluate(tmp_path, *sweep, world_size=2, **{FUSE: str(BATCHES // 2 * 2 + 1)})
    assert -signal.SIGKILL in codes
    assert len(stamps(tmp_path / "out")) == 1
    assert evaluate(tmp_path, *sweep) == [0]
    assert_same_files(tmp_path, undisturbed, digits=9)


@pytest.mark.slow
def test_torchrun_gives_the_files_of_one_process(export, undisturbed, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "eval.py")
    output = python_output(*launch, *SWEEP, *of(export, tmp_path))
    assert output.count("PSNR") == output.count("report: ") == 1
    assert_same_files(tmp_path, undisturbed, digits=9)
