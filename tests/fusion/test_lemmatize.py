"""The command `fusion-lemmatize`."""

import sys

import pytest

from flextok.cli import main
from flextok.fusion.results import read_results, read_run_config, write_results


def row(uuid, prediction, *answers):
    return {
        "uuid": uuid,
        "paraphrases": ["q"],
        "answers": list(answers),
        "prediction": prediction,
        "generation": f" {prediction}\n",
    }


ROWS = [
    row("a", "Paris!", "paris"),
    row("b", "the city of Rome", "Roma", "Rome"),
    row("c", "", "Oslo"),
    row("d", "Bern", "Basel"),
]


@pytest.mark.parametrize("suffix", [".feather", ".parquet"])
def test_lemmas_are_filled_and_accuracy_is_printed(tmp_path, capsys, suffix):
    file = tmp_path / f"x{suffix}"
    write_results(file, ROWS, {"method": "fusion"})
    assert main(["fusion-lemmatize", str(file)]) == 0
    out = capsys.readouterr().out
    assert "4 rows, lemmatizer simple" in out
    assert "exact     0.2500  (1 of 4)" in out
    assert "contains  0.5000  (2 of 4)" in out
    rows = read_results(file)
    assert [one["predict_lemma"] for one in rows] == [["paris"], ["the", "city", "of", "rome"], [], ["bern"]]
    assert rows[1]["answer_lemmas"] == [["roma"], ["rome"]]
    lemmas = ("predict_lemma", "answer_lemmas")
    assert [{name: value for name, value in one.items() if name not in lemmas} for one in rows] == ROWS
    assert read_run_config(file) == {"method": "fusion", "lemmatizer": "simple"}


def test_again_with_the_same_result(tmp_path, capsys):
    write_results(tmp_path / "x.feather", [ROWS[0] | {"variant": 3, "confidence": 0.5}])
    assert main(["fusion-lemmatize", str(tmp_path / "x.feather")]) == 0
    first = read_results(tmp_path / "x.feather")
    assert main(["fusion-lemmatize", str(tmp_path / "x.feather")]) == 0
    assert read_results(tmp_path / "x.feather") == first
    assert first[0]["variant"] == 3


def test_a_table_without_rows_has_no_accuracy(tmp_path, capsys):
    write_results(tmp_path / "x.feather", [])
    assert main(["fusion-lemmatize", str(tmp_path / "x.feather")]) == 0
    assert "exact     no rows" in capsys.readouterr().out


def test_mistakes_are_one_line_and_harm_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    write_results(tmp_path / "x.feather", ROWS)
    before = (tmp_path / "x.feather").read_bytes()
    for arguments, message in (
        ([str(tmp_path / "x.feather"), "--lemmatizer", "spacy"], "flextok[lemmas]"),
        ([str(tmp_path / "missing.feather")], "no such file"),
        ([str(tmp_path / "x.csv")], "valid: .feather, .parquet"),
    ):
        assert main(["fusion-lemmatize", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "x.feather").read_bytes() == before
