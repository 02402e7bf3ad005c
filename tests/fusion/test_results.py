"""Files of results: what is written is what is read, or nothing is written."""

from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from flextok.fusion.results import read_results, read_run_config, result_name, write_results

ROW = {
    "uuid": "a",
    "paraphrases": ["capital of France?", "Où est la capitale ?"],
    "answers": ["Paris"],
    "prediction": "Paris",
    "generation": " Paris\n",
}
LEMMAS = {"predict_lemma": ["paris"], "answer_lemmas": [["paris"], ["lutetia"]]}
each_format = pytest.mark.parametrize("suffix", [".feather", ".parquet"])


@each_format
def test_rows_come_back_equal(tmp_path, suffix):
    rows = [ROW | LEMMAS, ROW | LEMMAS | {"uuid": "b", "prediction": "", "predict_lemma": []}]
    write_results(tmp_path / f"x{suffix}", rows, {"method": "fusion", "seed": 1})
    assert read_results(tmp_path / f"x{suffix}") == rows
    assert read_run_config(tmp_path / f"x{suffix}") == {"method": "fusion", "seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


@each_format
def test_lemmas_that_are_not_there_are_none(tmp_path, suffix):
    write_results(tmp_path / f"x{suffix}", [ROW])
    assert read_results(tmp_path / f"x{suffix}") == [ROW | dict.fromkeys(LEMMAS)]
    assert read_run_config(tmp_path / f"x{suffix}") is None


@each_format
def test_optional_columns_are_there_if_any_row_has_them(tmp_path, suffix):
    extra = {"variant": 0, "paraphrase": "capital of France?", "confidence": 0.25, "prompt": "Q:"}
    write_results(tmp_path / f"x{suffix}", [ROW | extra, ROW | {"variant": 1}])
    first, second = read_results(tmp_path / f"x{suffix}")
    assert {name: first[name] for name in extra} == extra
    assert {name: second[name] for name in extra} == {**dict.fromkeys(extra), "variant": 1}


@each_format
def test_types_are_there_without_any_row(tmp_path, suffix):
    write_results(tmp_path / f"x{suffix}", [])
    read = {".feather": pyarrow.feather.read_table, ".parquet": pyarrow.parquet.read_table}[suffix]
    text, texts = pa.string(), pa.list_(pa.string())
    schema = read(tmp_path / f"x{suffix}").schema
    types = dict(zip(schema.names, schema.types, strict=True))
    assert types == {
        **{"uuid": text, "paraphrases": texts, "answers": texts, "prediction": text, "generation": text},
        **{"predict_lemma": texts, "answer_lemmas": pa.list_(texts)},
    }
    assert read_results(tmp_path / f"x{suffix}") == []


def test_nullable_columns_that_the_file_lacks_are_none(tmp_path):
    pyarrow.feather.write_feather(pa.Table.from_pylist([ROW]), str(tmp_path / "x.feather"))
    assert read_results(tmp_path / "x.feather") == [ROW | dict.fromkeys(LEMMAS)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{k: v for k, v in ROW.items() if k != "generation"}], "row of uuid='a': generation is missing"),
        ([ROW | {"prediction": None}], "prediction is missing"),
        ([ROW | {"predictoin": "x"}], "the field 'predictoin' is unknown; valid: uuid, paraphrases"),
        ([ROW | {"answers": "Paris"}], "answers='Paris' is not a list of texts"),
        ([ROW | {"answers": [["Paris"]]}], "is not a list of texts"),
        ([ROW | {"answer_lemmas": ["paris"]}], "is not a list of lists of texts"),
        ([ROW | {"confidence": "0.5"}], "confidence='0.5' is not a number"),
        ([ROW | {"variant": True}], "variant=True is not a whole number"),
        ([ROW | {"generation": "\ud800"}], "is not a text"),
        ([ROW, ROW], "two rows have uuid='a' and variant=None"),
        ([ROW | {"variant": 1}, ROW | {"variant": 0}, ROW | {"variant": 1}], "two rows have uuid='a' and variant=1"),
    ],
)
def test_rows_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, rows, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        write_results(tmp_path / "x.feather", rows)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_config_that_is_no_json_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="run_config cannot be written as JSON"):
        write_results(tmp_path / "x.feather", [], {"path": tmp_path})


@each_format
def test_a_file_is_replaced_only_if_asked(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_results(path, [ROW])
    with pytest.raises(FileExistsError, match="overwrite=true"):
        write_results(path, [])
    assert len(read_results(path)) == 1
    write_results(path, [], overwrite=True)
    assert read_results(path) == []


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(table, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    write_results(tmp_path / "x.feather", [ROW])
    monkeypatch.setattr(pyarrow.feather, "write_feather", fail)
    with pytest.raises(OSError, match="no space left"):
        write_results(tmp_path / "x.feather", [], overwrite=True)
    assert len(read_results(tmp_path / "x.feather")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.feather"]


@pytest.mark.parametrize("name", ["x.csv", "x"])
def test_other_formats_are_refused(tmp_path, name):
    for call in (lambda: write_results(tmp_path / name, []), lambda: read_results(tmp_path / name)):
        with pytest.raises(ValueError, match=r"valid: \.feather, \.parquet"):
            call()


@each_format
def test_files_that_cannot_be_read_are_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(ValueError, match="no such file"):
        read_results(path)
    path.write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(path)


def test_a_table_of_something_else_is_an_error(tmp_path):
    pyarrow.feather.write_feather(pa.table({"uuid": ["a"], "text": ["b"]}), str(tmp_path / "x.feather"))
    with pytest.raises(
        ValueError, match="paraphrases and answers and prediction and generation is missing; found: uuid"
    ):
        read_results(tmp_path / "x.feather")


def test_names_of_files():
    assert result_name("fusion", num_paraphrases=5) == "fusion-5"
    assert result_name("max", num_paraphrases=5, indices=[0, 2, 4]) == "max-0-2-4"
