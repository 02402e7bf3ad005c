"""Every command runs and writes what it promises; how fast anything is, is not judged here."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks import (
    attention_backends,
    data_loading,
    decoding,
    demo,
    flops,
    operator_calls,
    paraphrase_fusion,
    sample_data,
    start_up,
    training_loop,
    training_step,
    workloads,
)
from benchmarks.bare_loop import Stopwatch
from benchmarks.candidates import CANDIDATES, YARDSTICKS
from flextok.data.digits import Digits
from flextok.data.loaders import ResumableLoader
from flextok.data.samplers import TrainSampler
from flextok.data.samples import collate
from tests.benchmarks.support import MINIATURE


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command on the miniature workload and read what it wrote."""
    monkeypatch.setitem(workloads.WORKLOADS, "bench", MINIATURE)
    monkeypatch.setattr(flops, "peak_flops", lambda device: (1e9, "assumed"))

    def run(command, *arguments):
        out = tmp_path / "results" / "out.json"
        command.main([*map(str, arguments), "--device", "cpu", "--out", str(out)])
        content = json.loads(out.read_text())
        assert content["machine"].keys() >= {"cpu", "cores", "threads", "gpu", "torch", "platform", "date"}
        assert [path.name for path in out.parent.iterdir()] == ["out.json"]
        return content

    return run


def test_paraphrase_fusion(run, monkeypatch):
    monkeypatch.setattr(paraphrase_fusion, "MASK_LENGTHS", (64, 256))
    monkeypatch.setattr(paraphrase_fusion, "EVALUATED_UP_TO", 64)
    sizes = {"layers": 1, "width": 64, "wordings": 2, "length": 6, "new-tokens": 3}
    content = run(paraphrase_fusion, "--repeats", 2, *(f"--{name}={value}" for name, value in sizes.items()))
    ways = {row["way"]: row for row in content["rows"]}
    assert list(ways) == ["fused", "fused_again", "apart", "apart_again"]
    assert ways["fused"]["times_as_long_as_fused"] == 1
    assert all(row["seconds"] > 0 for row in ways.values())
    assert [row["tokens"] for row in content["block_masks"]] == [64, 256]
    assert ["evaluated_ms" in row for row in content["block_masks"]] == [True, False]


def test_training_step(run, monkeypatch):
    monkeypatch.setattr(training_step, "NUM_DRAWS", 2)
    content = run(training_step, "--repeats", 2)
    (workload,) = content["workloads"]
    rows = {row["candidate"]: row for row in workload["candidates"]}
    assert tuple(rows) == CANDIDATES
    full = MINIATURE.batch * (16 + 8)
    for name, row in rows.items():
        assert row["images_per_second"] > 0
        assert row["mfu"] > 0
        assert row["saved_bytes"] > 0
        assert row["backends"] == {"sdpa": 2 * 2}
        assert len(row["seconds"]) == 2
        assert (row["tokens"]["encoder"] < full) == (name not in YARDSTICKS)
        assert (row["tokens"]["decoder"] < full) == (name == "packed")
    assert {(row["candidate"], row["yardstick"]) for row in workload["ratios"]} >= {
        ("packed", "plain"),
        ("packed", "batched"),
    }


def test_decoding(run):
    content = run(decoding, "--repeats", 1, "--steps", 1)
    rows = [row for row in content["rows"] if row["candidate"] == "packed"]
    assert [(row["guidance"], row["keep_k"]) for row in rows] == [(g, k) for g in (3.0, 1.0) for k in (1, 4, 8)]
    unguided = [row["tokens_per_step"] for row in rows if row["guidance"] == 1.0]
    assert unguided == [MINIATURE.batch * (16 + keep_k) for keep_k in (1, 4, 8)]
    assert all(row["times_faster_than_plain"] > 0 and row["times_faster_than_batched"] > 0 for row in rows)
    assert rows[-1]["time_over_tokens"] == 1.0
    plain = next(row for row in content["rows"] if row["candidate"] == "plain")
    assert plain["tokens_per_step"] == 2 * MINIATURE.batch * (16 + 8)


def test_operator_calls(run):
    content = run(operator_calls, "--batches", 1, 3)
    counts = {(row["candidate"], row["batch"]): row for row in content["rows"]}
    assert {name for name, _ in counts} == set(CANDIDATES)
    assert all(row["training_operators"] > row["decoding_operators"] > 0 for row in counts.values())
    # Lists of samples, looped over: the count has to see them.
    assert counts["plain", 3]["training_operators"] > counts["plain", 1]["training_operators"] + 100


def test_attention_backends(run):
    content = run(attention_backends, "--repeats", 1, "--lengths", 8, "--head-dims", 16)
    rows = content["rows"]
    assert {row["layout"] for row in rows} == {"full", "ragged", "causal_last"}
    for row in rows:
        assert ("reason" in row) != ("median_seconds" in row)
        assert row.get("max_difference", 0.0) < 1e-5
    ran = {(row["backend"], row["backward"]) for row in rows if "seconds" in row}
    assert ran >= {(name, backward) for name in ("dense row", "sdpa", "reference") for backward in (False, True)}


def test_start_up(run, monkeypatch):
    monkeypatch.setattr(start_up, "COMMANDS", {"import flextok": ("-c", "import flextok, json")})
    (row,) = run(start_up, "--repeats", 1)["rows"]
    assert row["median_seconds"] > 0
    assert row["loads"] == []


def test_data_loading(run, monkeypatch):
    monkeypatch.setattr(data_loading, "WORKERS", (0, 1))
    monkeypatch.setattr(data_loading, "BATCH", 4)
    monkeypatch.setattr(sample_data, "NUM_FILES", 16)
    content = run(data_loading, "--repeats", 1, "--images", 16)
    rows = {(row["data"], row["workers"]): row for row in content["rows"]}
    assert set(rows) == {(name, workers) for name in data_loading.SOURCES for workers in (0, 1)}
    for row in rows.values():
        assert row["images_per_second"] == 16 / row["seconds"][0]
        assert row["images_per_second_per_core"] == row["images_per_second"]
    samples = {name: row["sample"] for (name, _), row in rows.items()}
    assert samples["image_folder"] == "image 3x256x256"
    assert samples["latents"] == "latents 16x32x32"


def test_data_loading_takes_images_of_ones_own(run, monkeypatch, tmp_path):
    monkeypatch.setattr(data_loading, "WORKERS", (0,))
    monkeypatch.setattr(data_loading, "BATCH", 1)
    monkeypatch.setitem(data_loading.SOURCES, "image_folder", None)  # Nothing is made.
    for number in range(8):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
    content = run(data_loading, "--repeats", 1, "--images", 2, "--data", "image_folder", "--root", tmp_path)
    assert content["own_images"]
    assert str(tmp_path) not in json.dumps(content)


SMALL_LOOP = replace(
    training_loop.WORKLOADS["digits"],
    overrides=(
        *("model=tiny", "data.batch_size=8", "size.encoder_depth=1", "size.decoder_depth=1"),
        *("size.encoder_width=32", "size.decoder_width=32", "optimizer.warmup_steps=1", "latent.channels=1"),
        *("size.intermediate_layer=0", "trainer.log_every_n_steps=2"),
    ),
    num_latents=40,
    steps=3,
)


@pytest.mark.parametrize("reads_latents", [False, True])
def test_training_loop(run, monkeypatch, reads_latents):
    monkeypatch.setitem(training_loop.WORKLOADS, "digits", replace(SMALL_LOOP, reads_latents=reads_latents))
    for name, value in (("WARM_UP", 1), ("WAITING_STEPS", 4), ("WORKERS", (0,))):
        monkeypatch.setattr(training_loop, name, value)
    content = run(training_loop, "--repeats", 2, "--workload", "digits")
    (overhead,) = content["overhead"]
    assert len(overhead["ratios"]) == len(overhead["cpu_ratios"]) == 2
    assert overhead["ratio_lowest"] <= overhead["ratio"] <= overhead["ratio_highest"]
    assert overhead["batch"] == 8
    # Without this the two would not have done the same work.
    assert overhead["largest_difference_of_weights"] == 0.0
    (waiting,) = content["waiting"]
    assert len(waiting["waiting_shares"]) == 2
    assert 0 < waiting["waiting_share_lowest"] <= waiting["waiting_share"] <= waiting["waiting_share_highest"] < 1


def test_the_stopwatch_counts_every_step_once_over_ends_of_epochs():
    dataset = Digits(torch.zeros(6, 1, 8, 8), list("abcdef"))
    loader = ResumableLoader(
        dataset, batch_size=2, sampler=TrainSampler(dataset, batch_size=2, seed=0), collate_fn=collate
    )
    seen = []
    watch = Stopwatch(between=lambda batch: seen.append(batch["key"]))
    handed_out = []
    with watch.watching():
        for _ in range(2):
            batches = iter(loader)
            handed_out += [
                next(batches)["key"] for _ in range(3)
            ]  # As Lightning does, which does not ask for a fourth.
    assert seen == handed_out
    assert len(watch.steps) == len(watch.fetches) == len(watch.others) == 6


@pytest.mark.slow
def test_demo(run):
    pytest.importorskip("playwright")
    if not any(map(shutil.which, demo.BROWSERS)):
        pytest.skip("needs Chromium or Chrome on the path")
    content = run(demo, "--repeats", 1)
    assert [row["what"] for row in content["rows"]] == [demo.READY, demo.FIRST, demo.SECOND, demo.SLIDER]
    assert all(row["median_seconds"] > 0 for row in content["rows"])
    assert content["checkpoint"] == ["embedded:photos"]
