"""Lines that survive a kill."""

import json
import os

import pytest

from flextok.fusion.journal import Journal

RECORDS = [{"n": n, "text": "zwei\nLinien é \u2028"[: 4 * n]} for n in range(4)]


def records_in(path):
    journal = Journal(path)
    journal.close()
    return journal.records


def test_wherever_a_file_is_cut_off_its_whole_lines_remain_and_it_goes_on(tmp_path):
    path = tmp_path / "folder" / "x.jsonl"
    journal = Journal(path)
    journal.add(RECORDS[:1])
    journal.add(RECORDS[1:])
    journal.close()
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == RECORDS
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        kept = (whole[:cut] + b"\n").count(b"}\n")  # A line that lacks nothing but its end is whole.
        assert journal.records == RECORDS[:kept]
        journal.add(RECORDS[kept:])
        journal.close()
        assert path.read_bytes() == whole


def test_a_file_that_nobody_wrote_is_empty(tmp_path):
    assert records_in(tmp_path / "x.jsonl") == []
    assert records_in(tmp_path / "x.jsonl") == []


def test_all_can_be_forgotten(tmp_path):
    journal = Journal(tmp_path / "x.jsonl")
    journal.add(RECORDS)
    journal.clear()
    journal.add(RECORDS[:1])
    journal.close()
    assert records_in(tmp_path / "x.jsonl") == RECORDS[:1]


def test_a_file_stays_as_it_is_until_something_is_added(tmp_path):
    """It may have been named by mistake."""
    content = b'{"n": 0}\n{"n": 1, "te'
    (tmp_path / "x.jsonl").write_bytes(content)
    assert records_in(tmp_path / "x.jsonl") == [{"n": 0}]
    assert (tmp_path / "x.jsonl").read_bytes() == content


def test_damage_inside_is_not_taken_for_an_interruption(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"n": 0}\n{"n": \n{"n": 2}\n')
    with pytest.raises(ValueError, match="line 2: is damaged"):
        Journal(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 3


def test_one_process_at_a_time(tmp_path):
    journal = Journal(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="another process is writing"):
        Journal(tmp_path / "x.jsonl")
    journal.close()
    assert records_in(tmp_path / "x.jsonl") == []


def test_what_could_not_be_written_is_not_there_twice(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "x.jsonl")
    journal.add(RECORDS[:1])
    with monkeypatch.context() as patch:

        def full(file):
            raise OSError("no space left")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            journal.add(RECORDS[1:3])
    journal.add(RECORDS[1:])
    journal.close()
    assert records_in(tmp_path / "x.jsonl") == RECORDS
