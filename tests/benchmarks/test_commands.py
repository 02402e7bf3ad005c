"""Every command runs and writes what it promises; how fast anything is, is not judged here."""

import json

import pytest

from benchmarks import (
    attention_backends,
    decoding,
    flops,
    operator_calls,
    start_up,
    training_step,
    workloads,
)
from benchmarks.candidates import CANDIDATES, YARDSTICKS
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
