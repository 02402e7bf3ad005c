"""Results that grow row by row, and what remains of them after a kill."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress

import pytest

from flextok.fusion.result_file import ResultFile
from flextok.fusion.results import read_results, read_run_config
from tests.support import REPOSITORY

CONFIG = {"method": "fusion", "fusion": {"seed": 1}}


def row(uuid, variant=None):
    texts = {"paraphrases": ["q"], "answers": ["a"], "prediction": f"of {uuid}", "generation": "é\n"}
    return {"uuid": uuid, **texts, **({} if variant is None else {"variant": variant})}


def opened(folder, config=CONFIG, *, overwrite=False, resume=True):
    return ResultFile(folder / "x.feather", config, overwrite=overwrite, resume=resume)


def uuids(folder):
    return [one["uuid"] for one in read_results(folder / "x.feather")]


def interrupted(folder, *rows):
    """What a run leaves that ended after these rows."""
    with suppress(KeyboardInterrupt), opened(folder) as results:
        results.add(rows)
        raise KeyboardInterrupt


def test_a_run_without_interruption_leaves_the_file_alone(tmp_path):
    with opened(tmp_path) as results:
        assert results.done == set()
        results.add([row("a", 0), row("a", 1)])
        results.add([row("b", 0)])
        assert results.done == {("a", 0), ("a", 1), ("b", 0)}
    assert [one["variant"] for one in read_results(tmp_path / "x.feather")] == [0, 1, 0]
    assert read_run_config(tmp_path / "x.feather") == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["x.feather"]


def test_a_run_without_rows_leaves_an_empty_table(tmp_path):
    opened(tmp_path).close()
    assert uuids(tmp_path) == []


def test_an_interrupted_run_goes_on(tmp_path):
    interrupted(tmp_path, row("a"), row("b"))
    assert not (tmp_path / "x.feather").exists()
    with opened(tmp_path) as results:
        assert results.done == {("a", None), ("b", None)}
        assert results.rows == [row("a"), row("b")]
        results.add([row("c")])
    assert uuids(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("lost", [2, 10, 60])
def test_a_torn_last_line_is_done_again(tmp_path, lost):
    interrupted(tmp_path, row("a"), row("b"))
    journal = tmp_path / "x.feather.journal"
    journal.write_bytes(journal.read_bytes()[:-lost])
    with opened(tmp_path) as results:
        assert results.done == {("a", None)}
        results.add([row("b")])
    assert uuids(tmp_path) == ["a", "b"]


def test_a_torn_first_line_is_a_run_that_has_not_begun(tmp_path):
    interrupted(tmp_path)
    journal = tmp_path / "x.feather.journal"
    journal.write_bytes(journal.read_bytes()[:5])
    with opened(tmp_path) as results:
        results.add([row("a")])
    assert uuids(tmp_path) == ["a"]


def test_damage_before_the_last_line_is_an_error(tmp_path):
    interrupted(tmp_path, row("a"), row("b"))
    journal = tmp_path / "x.feather.journal"
    journal.write_bytes(journal.read_bytes().replace(b'{"uuid": "a"', b"\0" * 12))
    with pytest.raises(ValueError, match="line 2: is damaged"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"method": "max"}, "method='fusion', this run has method='max'"),
        (CONFIG | {"new": None}, "new='absent', this run has new=None"),
        ({"method": "fusion"}, "fusion={'seed': 1}, this run has fusion='absent'"),
    ],
)
def test_a_run_goes_on_only_with_its_own_settings(tmp_path, config, message):
    interrupted(tmp_path, row("a"))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        opened(tmp_path, config)
    assert message in str(raised.value)
    assert opened(tmp_path).done == {("a", None)}, "an error must not harm the journal"


def test_settings_are_compared_as_json(tmp_path):
    config = {"indices": (0, 1)}
    opened(tmp_path, config)._journal.close()
    assert opened(tmp_path, {"indices": [0, 1]}).done == set()


def test_an_interrupted_run_is_not_lost_by_accident(tmp_path):
    interrupted(tmp_path, row("a"))
    with pytest.raises(FileExistsError, match="resume=true goes on"):
        opened(tmp_path, resume=False)
    with opened(tmp_path, {"method": "max"}, resume=False, overwrite=True) as results:
        assert results.done == set()
        results.add([row("b")])
    assert uuids(tmp_path) == ["b"]
    assert read_run_config(tmp_path / "x.feather") == {"method": "max"}


def test_a_finished_file_is_replaced_only_if_asked_and_at_the_end(tmp_path):
    with opened(tmp_path) as results:
        results.add([row("a")])
    with pytest.raises(FileExistsError, match="overwrite=true"):
        opened(tmp_path)
    with opened(tmp_path, overwrite=True) as results:
        results.add([row("b")])
        assert uuids(tmp_path) == ["a"]
    assert uuids(tmp_path) == ["b"]


@pytest.mark.parametrize(
    "rows", [[row("b"), row("a")], [row("b"), row("b")], [row("b"), {"uuid": "c"}], [row("b"), row("d") | {"x": 1}]]
)
def test_rows_that_do_not_fit_are_not_written_and_nor_are_those_beside_them(tmp_path, rows):
    with opened(tmp_path) as results:
        results.add([row("a")])
        with pytest.raises(ValueError, match="already|missing|unknown"):
            results.add(rows)
        assert results.done == {("a", None)}
    assert uuids(tmp_path) == ["a"]


def test_two_processes_do_not_write_one_file(tmp_path):
    with opened(tmp_path) as results:
        results.add([row("a")])
        with pytest.raises(ValueError, match="another process is writing"):
            opened(tmp_path)
    assert uuids(tmp_path) == ["a"]


PROGRAM = """
import json, os, signal, sys
from flextok.fusion.result_file import ResultFile

folder, killed_in, one = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
with ResultFile(folder + "/x.feather", {}, overwrite=False, resume=True) as results:
    for batch in range(5):
        rows = [one | {"uuid": f"{batch}.{n}", "prediction": f"of {batch}.{n}"} for n in range(3)]
        rows = [one for one in rows if (one["uuid"], None) not in results.done]
        if batch == killed_in:
            # The middle of writing a batch: its first row and a half of the second are in the file.
            lines = b"".join(json.dumps(one).encode() + b"\\n" for one in rows)
            cut = len(lines) // 2
            results._journal._file.write(lines[:cut])
            results._journal._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if rows:
            results.add(rows)
"""


def run_program(folder, killed_in):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), str(killed_in), json.dumps(row("x"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=120)


def test_kills_in_the_middle_of_writing_repeat_and_lose_nothing(tmp_path):
    for killed_in in (0, 2, 4):
        assert run_program(tmp_path, killed_in).returncode == -signal.SIGKILL
        assert not (tmp_path / "x.feather").exists()
    lines = (tmp_path / "x.feather.journal").read_bytes().split(b"\n")
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[-1])
    done = run_program(tmp_path, -1)
    assert done.returncode == 0, done.stderr.decode()
    assert uuids(tmp_path) == [f"{batch}.{n}" for batch in range(5) for n in range(3)]
    assert read_results(tmp_path / "x.feather")[4]["prediction"] == "of 1.1"
    assert not (tmp_path / "x.feather.journal").exists()
