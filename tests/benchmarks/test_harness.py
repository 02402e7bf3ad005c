"""Measurements are taken in turn, and results are written whole."""

import json

import pytest
import torch

from benchmarks.harness import measure, measure_in_turn, median_ratio, print_table, write_results
from benchmarks.observation import saved_bytes

CPU = torch.device("cpu")


def test_functions_are_called_in_turn_and_warm_up_does_not_count():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measure_in_turn(functions, repeats=2, warmup=1, device=CPU)
    assert "".join(calls) == "abcabcabc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert measure(lambda: None, repeats=3, warmup=0, device=CPU) >= 0


def test_a_ratio_is_taken_round_by_round():
    # The machine slows down tenfold after the first round: the ratio of the rounds stays.
    assert median_ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2.0


def test_results_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "out.json"
    write_results(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_results(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_table_has_every_column_once(capsys):
    print_table([{"a": 1.23456, "b": "x"}, {"a": 123456.0, "c": None}])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["a", "b", "c"],
        ["1.235", "x", "-"],
        ["123,456", "-", "-"],
    ]


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    weight = torch.ones(4, 4, requires_grad=True)
    x = torch.ones(8, 4)

    def forward():
        return (x @ weight).exp().sum() + (x[:4] @ weight).sum()

    # x, kept twice but stored once, and the result of exp; the weight is known.
    assert saved_bytes(forward, [weight]) == 2 * 8 * 4 * 4
