"""The command `fuse`: real runs on a random model, interruptions, weights, and what it refuses."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from flextok.cli import main
from flextok.cli.fusion_settings import OLD_OPTIONS
from flextok.fusion.answerer import Answerer
from flextok.fusion.items import Item
from flextok.fusion.methods import METHODS, NEEDS_WEIGHTS
from flextok.fusion.results import read_results, read_run_config
from tests.fusion.toy import ITEMS, write_items
from tests.support import REPOSITORY, Killed

pytestmark = pytest.mark.filterwarnings("ignore:builtin type Swig:DeprecationWarning")


@pytest.fixture
def fuse(toy_questions, tmp_path, capsys):
    """Runs it on the toy; returns exit status and what was printed."""

    def run(*overrides):
        chosen = any(override.startswith("fusion.indices") for override in overrides)
        toy = [override for override in toy_questions if not (chosen and "num_paraphrases" in override)]
        status = main(["fuse", *toy, f"fusion.out={tmp_path}/out", *overrides])
        return status, capsys.readouterr()

    return run


def rows_of(tmp_path, name):
    return read_results(tmp_path / "out" / name)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_every_question(method, fuse, tmp_path):
    weights = ["fusion.weights=uniform"] if method in NEEDS_WEIGHTS else []
    status, printed = fuse(f"fusion.method={method}", *weights)
    assert status == 0, printed.err
    assert re.search(
        r"5 questions, exact 0\.\d+ \[.*\], contains 0\.\d+ \[.*\], [\d.]+ prompt tokens, [\d.]+ new ones", printed.out
    )
    assert "5/5" in printed.err
    assert "contains=" in printed.err
    rows = rows_of(tmp_path, f"{method}-3.feather")
    uuids = [row["uuid"] for row in rows]
    if method == "per_prompt":
        assert uuids == [item.uuid for item in ITEMS for _ in item.paraphrases]
        assert [row["variant"] for row in rows] == [n for item in ITEMS for n in range(len(item.paraphrases))]
        assert [row["paraphrase"] for row in rows] == [text for item in ITEMS for text in item.paraphrases]
        assert rows[0]["prompt"] == "Q: what is the capital of france?\nA:"
    else:
        assert uuids == [item.uuid for item in ITEMS]
        assert not {"variant", "paraphrase", "confidence"} & set(rows[0])
    for row in rows:
        assert row["prediction"] == row["generation"].partition("\n")[0].strip()
        assert row["predict_lemma"] is not None
        assert len(row["answer_lemmas"]) == len(row["answers"])
    config = read_run_config(tmp_path / "out" / f"{method}-3.feather")
    assert (config["method"], config["lemmatizer"], config["max_new_tokens"]) == (method, "simple", 6)
    assert config["measured"]["questions"] == 5
    assert config["measured"]["prompt_tokens"] > 0


def test_alone_it_answers_the_questions_of_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fuse", "fusion.limit=48"]) == 0
    shown = re.search(r"^results/fusion-5\.feather: 48 questions, exact (0\.\d+)", capsys.readouterr().out)
    # There are hundreds of answers to guess among.
    assert float(shown[1]) > 0.4


def test_answers_do_not_depend_on_the_batch_size(fuse, tmp_path):
    fuse("fusion.format=parquet")
    fuse("fusion.batch_size=1")
    assert rows_of(tmp_path, "fusion-3.parquet") == rows_of(tmp_path, "fusion-3.feather")


def test_wordings_are_chosen_by_number_and_questions_by_limit(fuse, tmp_path):
    status, printed = fuse("fusion.indices=[0]", "fusion.limit=2")
    assert status == 0, printed.err
    rows = rows_of(tmp_path, "fusion-0.feather")
    assert [row["paraphrases"] for row in rows] == [item.paraphrases[:1] for item in ITEMS[:2]]
    fuse("fusion.method=origin", "fusion.limit=2")
    assert [row["generation"] for row in rows] == [row["generation"] for row in rows_of(tmp_path, "origin-3.feather")]
    status, printed = fuse("fusion.indices=[0,2]")
    assert status == 1
    assert "'italy' has 1 wordings; valid: 0 to 0" in printed.err


def test_accuracy_counts_right_answers(fuse, tmp_path):
    fuse()
    known = [row for row in rows_of(tmp_path, "fusion-3.feather") if row["predict_lemma"]]
    assert known, "the toy says nothing"
    questions = {item.uuid: item.paraphrases for item in ITEMS}
    items = [Item(row["uuid"], ["nothing", row["prediction"]], questions[row["uuid"]]) for row in known]
    wrong = Item("wrong", ["nothing"], ["what is this?"])
    file = write_items(tmp_path / "known.jsonl", [*items, wrong])
    status, printed = fuse(f"fusion.data.path={file}", "fusion.overwrite=true")
    assert status == 0
    share = f"{len(items) / (len(items) + 1):.3f}"
    assert f"exact {share} [" in printed.out
    assert f"contains {share} [" in printed.out
    assert f"exact={share}" in printed.err


def test_strategies_differ_and_repeat(fuse, tmp_path):
    texts = {}
    for strategy in ("greedy", "sampling", "beams"):
        for attempt in range(2):
            status, _ = fuse(f"fusion.strategy={strategy}", "fusion.overwrite=true", "fusion.beams=2")
            assert status == 0
            texts[strategy, attempt] = [row["generation"] for row in rows_of(tmp_path, "fusion-3.feather")]
    assert all(texts[strategy, 0] == texts[strategy, 1] for strategy, _ in texts)
    assert texts["greedy", 0] != texts["sampling", 0]


def test_options_of_the_prompt_reach_it(fuse, tmp_path):
    counts = {}
    for name, overrides in {
        "plain": [],
        "separator": ["fusion.separator=' | '"],
        "tail": ["fusion.tail='\\nThe answer:'"],
        "instruction": ["fusion.data.prompts.instruction=Answer."],
        "repeated": ["fusion.data.prompts.instruction=Answer.", "fusion.shared_prefix=false"],
        "running": ["fusion.positions=running"],
        "aligned": ["fusion.positions=aligned"],
        "hidden": ["fusion.separator=' | '", "fusion.gap_keys=hidden"],
        "eager": ["fusion.backend=eager"],
        "bfloat16": ["fusion.dtype=bfloat16"],
    }.items():
        status, printed = fuse("fusion.overwrite=true", *overrides)
        assert status == 0, (name, printed.err)
        counts[name] = read_run_config(tmp_path / "out/fusion-3.feather")["measured"]["prompt_tokens"]
    assert counts["plain"] < counts["tail"]
    assert counts["plain"] < counts["separator"] == counts["hidden"]
    assert counts["plain"] < counts["instruction"] < counts["repeated"]
    assert counts["plain"] == counts["running"] == counts["aligned"] == counts["eager"] == counts["bfloat16"]


def test_web_questions_and_facts_from_json_lines(fuse, tmp_path):
    test = write_items(tmp_path / "test.jsonl", ITEMS[:2])
    facts = [Item(f"fact{n}", ["a"], [f"{n} is [MASK].", f"of {n}: [MASK]"]) for n in range(7)]
    examples = write_items(tmp_path / "examples.jsonl", facts)
    files = [f"fusion.data.path={test}", f"fusion.data.examples_path={examples}", "fusion.data.num_examples=2"]
    status, printed = fuse("fusion/data=webqa", "fusion.method=per_prompt", *files)
    assert status == 0, printed.err
    prompt = rows_of(tmp_path, "per_prompt-3.feather")[0]["prompt"]
    pattern = r"Q: \d is \[MASK\]\.\nA: a\n\nQ: \d is \[MASK\]\.\nA: a\n\nQ: what is the capital of france\?\nA:"
    assert re.fullmatch(pattern, prompt), prompt
    files[0] = f"fusion.data.path={write_items(tmp_path / 'facts.jsonl', facts[:4])}"
    status, printed = fuse("fusion/data=myriadlama", *files, "fusion.overwrite=true")
    assert status == 0, printed.err
    for row in rows_of(tmp_path, "fusion-3.feather"):
        assert row["prediction"] == next(iter(row["generation"].split()), "")


def test_a_prompt_that_is_too_long_is_named(fuse, tmp_path):
    long = Item("endless", ["x"], ["what " * 600])
    file = write_items(tmp_path / "long.jsonl", [*ITEMS[:3], long])
    status, printed = fuse(f"fusion.data.path={file}")
    assert status == 1
    assert "in the batch from question 'spain' to 'endless': prompts[1] and max_new_tokens=6 reach" in printed.err
    # What was answered before it is kept.
    assert fuse(f"fusion.data.path={write_items(file, ITEMS[:3])}")[0] == 0
    assert read_run_config(tmp_path / "out/fusion-3.feather")["measured"]["questions"] == 1


def test_confidence_becomes_weights(fuse, tmp_path):
    status, printed = fuse("fusion.method=per_prompt", "fusion.confidence_samples=8")
    assert status == 0, printed.err
    rows = rows_of(tmp_path, "per_prompt-3.feather")
    assert all(0 <= row["confidence"] <= 1 for row in rows)
    assert len({row["confidence"] for row in rows}) > 1
    best = {}
    for row in rows:
        if row["uuid"] not in best or row["confidence"] > best[row["uuid"]]["confidence"]:
            best[row["uuid"]] = row
    for method in ("weighted_max", "weighted_avg", "fusion"):
        status, printed = fuse(f"fusion.method={method}", f"fusion.weights={tmp_path}/out/per_prompt-3.feather")
        assert status == 0, printed.err
    answers = {row["uuid"]: row["generation"] for row in rows_of(tmp_path, "weighted_max-3.feather")}
    assert answers == {uuid: row["generation"] for uuid, row in best.items()}


def test_weights_that_do_not_fit_are_refused(fuse, tmp_path):
    fuse("fusion.method=per_prompt", "fusion.limit=2")
    file = tmp_path / "out/per_prompt-3.feather"
    status, printed = fuse(f"fusion.weights={file}")
    assert (status, "has no confidence of each wording; valid: what this writes" in printed.err) == (1, True)
    fuse("fusion.method=per_prompt", "fusion.limit=2", "fusion.confidence_samples=2", "fusion.overwrite=true")
    status, printed = fuse(f"fusion.weights={file}")
    assert (status, "has no confidence of wording 0 of question 'spain'" in printed.err) == (1, True)
    other = write_items(tmp_path / "other.jsonl", [Item("france", ["paris"], ["something else?"])])
    status, printed = fuse(f"fusion.weights={file}", f"fusion.data.path={other}")
    assert (status, "is 'what is the capital of france?' there and 'something else?' here" in printed.err) == (1, True)
    status, printed = fuse("fusion.weights=nowhere.feather")
    assert (status, "nowhere.feather" in printed.err) == (1, True)


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fusion", "per_prompt"])
def test_an_interrupted_run_goes_on(method, fuse, tmp_path, monkeypatch, toy_questions):
    whole = ["fusion.format=parquet", f"fusion.method={method}"]
    fuse(*whole)
    original, calls = Answerer.answer, []

    def dying(self, questions, weights=None):
        calls.append(len(questions))
        if len(calls) == 3:
            raise Killed
        return original(self, questions, weights)

    monkeypatch.setattr(Answerer, "answer", dying)
    with pytest.raises(Killed):
        fuse(f"fusion.method={method}")
    name = f"{method}-3.feather"
    assert not (tmp_path / "out" / name).exists()
    # A kill in the middle of a line, too.
    journal = tmp_path / "out" / f"{name}.journal"
    journal.write_bytes(journal.read_bytes()[:-20])
    monkeypatch.setattr(Answerer, "answer", original)
    status, printed = fuse(f"fusion.method={method}", "fusion.seed=1")
    assert (status, "was made with seed=0, this run has seed=1" in printed.err) == (1, True)
    status, printed = fuse(f"fusion.method={method}", "fusion.batch_size=5")
    assert status == 0, printed.err
    assert sorted(rows_of(tmp_path, name), key=str) == sorted(rows_of(tmp_path, f"{method}-3.parquet"), key=str)
    # The one that the cut went through, and the one that was never done.
    assert read_run_config(tmp_path / "out" / name)["measured"]["questions"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on(toy_questions, tmp_path, capsys):
    items = [
        Item(f"{item.uuid}-{n}", item.answers, [f"{n} {w}" for w in item.paraphrases])
        for n in range(60)
        for item in ITEMS
    ]
    overrides = [
        *toy_questions,
        f"fusion.data.path={write_items(tmp_path / 'many.jsonl', items)}",
        "fusion.batch_size=1",
    ]
    command = [sys.executable, "-m", "flextok", "fuse", *overrides, f"fusion.out={tmp_path}/killed"]
    journal = tmp_path / "killed/fusion-3.feather.journal"
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    before = journal.read_bytes().count(b"\n") - 1
    assert 4 <= before < len(items)
    for out in ("killed", "whole"):
        assert main(["fuse", *overrides, f"fusion.out={tmp_path}/{out}", "fusion.batch_size=50"]) == 0
    assert f"{before}/{len(items)}" in capsys.readouterr().err
    killed, whole = (read_results(tmp_path / out / "fusion-3.feather") for out in ("killed", "whole"))
    assert killed == whole
    assert [row["uuid"] for row in killed] == [item.uuid for item in items]
    assert not journal.exists()


def test_a_finished_file_is_left_alone(fuse, tmp_path):
    assert fuse()[0] == 0
    before = (tmp_path / "out/fusion-3.feather").read_bytes()
    status, printed = fuse("fusion.seed=1")
    assert (status, "exists already; fusion.overwrite=true" in printed.err) == (1, True)
    assert (tmp_path / "out/fusion-3.feather").read_bytes() == before
    assert fuse("fusion.seed=1", "fusion.overwrite=true")[0] == 0
    assert read_run_config(tmp_path / "out/fusion-3.feather")["seed"] == 1


# --- what it refuses --------------------------------------------------------------------------------------------------

BAD = {
    "fusion.method=mean": "fusion.method='mean' cannot be used; valid: fusion, avg, max",
    "fusion.positions=absolute": "fusion.positions='absolute' cannot be used; valid: restart, running, aligned",
    "fusion.gap_keys=seen": "fusion.gap_keys='seen' cannot be used; valid: visible, hidden",
    "fusion.backend=triton": "fusion.backend='triton' cannot be used; valid: auto, sdpa",
    "fusion.strategy=best": "fusion.strategy='best' cannot be used; valid: greedy, sampling, beams",
    "fusion.dtype=int8": "fusion.dtype='int8' cannot be used; valid: null, float32",
    "fusion.format=csv": "fusion.format='csv' cannot be used; valid: feather, parquet",
    "fusion.lemmatizer=nltk": "fusion.lemmatizer='nltk' cannot be used; valid: simple, spacy",
    "fusion.num_paraphrases=0": "fusion.num_paraphrases=0 cannot be used; valid: a whole number of at least 1",
    "fusion.num_paraphrases=2.5": "fusion.num_paraphrases=2.5 cannot be used",
    "fusion.batch_size=0": "fusion.batch_size=0 cannot be used",
    "fusion.max_new_tokens=0": "fusion.max_new_tokens=0 cannot be used",
    "fusion.limit=0": "fusion.limit=0 cannot be used; valid: null, or 1 or more",
    "fusion.indices=[]": "fusion.indices=[] cannot be used; valid: null, or numbers of wordings",
    "fusion.indices=[-1]": "fusion.indices=[-1] cannot be used",
    "fusion.indices=3": "fusion.indices=3 cannot be used",
    "fusion.temperature=0": "fusion.temperature=0 cannot be used; valid: a number above 0",
    "fusion.top_p=1.5": "fusion.top_p=1.5 cannot be used; valid: above 0 and at most 1",
    "fusion.top_k=0": "fusion.top_k=0 cannot be used",
    "fusion.beams=0": "fusion.beams=0 cannot be used",
    "fusion.seed=-1": "fusion.seed=-1 cannot be used",
    "fusion.shared_prefix=maybe": "fusion.shared_prefix='maybe' cannot be used; valid: true, false",
    "fusion.overwrite=1": "fusion.overwrite=1 cannot be used; valid: true, false",
    "fusion.confidence_samples=5": "fusion.confidence_samples=5 cannot be used; valid: 0, or fusion.method=per_prompt",
    "fusion.method=weighted_avg": "fusion.method=weighted_avg needs fusion.weights; valid: uniform, or the file",
    "fusion.method=avg fusion.weights=uniform": "fusion.weights='uniform' cannot be used; valid: null with fusion.meth",
    "fusion.method=per_prompt fusion.indices=[0,0]": "fusion.indices=[0, 0] cannot be used; valid: each number once",
    "fusion.indices=[0] fusion.num_paraphrases=2": "fusion.indices and fusion.num_paraphrases exclude each other",
    "fusion.positons=restart": "did you mean 'positions'?",
    "+fusion.colour=red": "fusion.colour is unknown; valid: method, model",
    "fusion/data=trivia": "trivia",
    "fusion.data.path=???": "fusion.data.path is missing; give fusion.data.path=...",
    "fusion.sample.manual=3": "fusion.sample.manual",
    "fusion.data.path=nowhere.jsonl": "nowhere.jsonl: there is no such file",
    "fusion.data.num_examples=2": "fusion.data.num_examples=2 needs fusion.data.examples_path",
    "fusion.positions=aligned fusion.data.prompts.instruction=Answer.": "fusion.positions='aligned' cannot be used",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_options_are_refused_before_the_model_is_loaded(overrides, toy_questions, tmp_path, capsys, monkeypatch):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("flextok.fusion.language_model.load_language_model", load)
    # Given twice, a setting would be refused for that.
    words = overrides.split()
    given = [word for word in toy_questions if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    if "fusion.indices=[0]" not in words:
        given = [word for word in given if "num_paraphrases" not in word]
    assert main(["fuse", *given, f"fusion.out={tmp_path}", *words]) == 1
    assert BAD[overrides] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fusion.model=/nowhere", "the language model '/nowhere' cannot be loaded"),
        ("fusion.device=tpu9", "fusion.device='tpu9'"),
    ],
)
def test_a_model_or_a_device_that_is_not_there(override, message, fuse):
    status, printed = fuse(override)
    assert (status, message in printed.err) == (1, True)


@pytest.mark.parametrize("option", OLD_OPTIONS)
def test_old_options_name_the_new_ones(option, capsys):
    with pytest.raises(SystemExit):
        main(["fuse", option, "5"])
    message = capsys.readouterr().err
    assert f"{option} is no option any more; use {OLD_OPTIONS[option]}" in message


def test_every_option_of_the_contract_is_a_key():
    """Those that stand for the old options, and the new ones."""
    from flextok.config import compose

    config = compose(["fusion/data=myriadlama"], "fuse").fusion
    keys = re.findall(r"fusion\.([\w.]+)", " ".join(OLD_OPTIONS.values()))
    for key in [*keys, "positions", "separator", "tail", "gap_keys", "shared_prefix", "backend", "seed"]:
        node = config
        for name in key.split("."):
            assert name in node, key
            node = node[name]
