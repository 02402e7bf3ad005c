"""needle-text, sparse-eval and train-hash from the command line, on models that are made in a moment."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextok.attention.sparse import build_config, load_hat_weights
from flextok.cli import main
from flextok.sparse_lm.dials import DIALS, dial
from flextok.sparse_lm.needles import KEYS, VALUES, make_needles, needle_text
from flextok.sparse_lm.sweep import format_table
from tests.fusion.language_models import letter_tokenizer, save_language_model
from tests.support import python_output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "needles.txt"
    assert main(["needle-text", str(path), "--passages", "40", "--seed", "3"]) == 0
    return path


def test_the_text_repeats_its_facts(text):
    passages = text.read_text().split("\n\n")
    assert len(passages) == 40
    for passage in passages:
        facts = [line.split(" ") for line in passage.strip().splitlines()]
        values = dict(facts)
        assert len(facts) == 4 * len(values)
        assert all(values[key] == value for key, value in facts)
        assert values.keys() <= set(KEYS)
        assert set(values.values()) <= set(VALUES)
    assert needle_text(40, 3) == text.read_text() != needle_text(40, 4)


def test_needles_lie_where_they_should(text):
    tokenizer = letter_tokenizer()
    options = {"length": 200, "count": 5, "seed": 0}
    for depth, low, high in ((0.0, 0, 0.01), (0.5, 0.35, 0.65), (1.0, 0.85, 1.0)):
        for needle in make_needles(text.read_text(), tokenizer, depth=depth, **options):
            prompt, answer = tokenizer.decode(needle.prompt), tokenizer.decode(needle.answer)
            key = prompt.splitlines()[-1]
            assert 150 < len(needle.prompt) <= 200
            assert prompt.count(key) == 2
            assert f"{key}{answer}\n" in prompt
            assert low <= prompt.index(key) / len(prompt) <= high
    words = make_needles(
        "Some prose. It goes on! " * 30, tokenizer, depth=0.5, template="{key} means {value}. ", **options
    )
    assert tokenizer.decode(words[0].prompt).endswith(" means")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{value}"}, "needle template"),
        ({"depth": 1.5}, r"depth 1\.5"),
        ({"length": 12}, "needles of -?\\d+ tokens of text cannot be made"),
        ({"length": 5000}, "needles of .* cannot be made: it is too short"),
    ],
)
def test_needles_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_needles(
            "short text. " * 3, letter_tokenizer(), **{"length": 60, "depth": 0.5, "count": 1, "seed": 0} | options
        )


@pytest.mark.parametrize("name", sorted(set(DIALS) - {"hash"}))
def test_dials_are_configurations(name):
    for density in (0.05, 0.2, 0.9):
        build_config(dial(name, density, 256))
    assert dial(name, 1.0, 256) == []


def test_wrong_dials_are_refused():
    with pytest.raises(ValueError, match="maskers 'sinks' are unknown; valid: sink_local"):
        dial("sinks", 0.5, 100)
    with pytest.raises(ValueError, match="density 0: it must be above 0"):
        dial("random", 0, 100)
    with pytest.raises(ValueError, match="maskers 'hash' need a file of weights"):
        dial("hash", 0.5, 100)


def test_hash_is_trained_and_measured(model, text, tmp_path, capsys):
    """The two commands after one another: what the first writes is what the second reads."""
    train = ["train-hash", model, "--text", text, "--out", tmp_path / "hash", "--context", 48, "--sequences", 6]
    train += ["--bits", 16, "--densities", 0.1, 0.3, "--steps", 5, "--hidden", 8]
    assert main([str(word) for word in train]) == 0
    assert "bits  density  learned  random" in capsys.readouterr().out
    weights = tmp_path / "hash" / "hash_16.safetensors"
    assert load_hat_weights(weights)[0]["query_matrix"][1].shape == (2, 8, 16)
    mine = tmp_path / "mine.yaml"
    mine.write_text("- {type: SinkMasker, sink_size: 2}\n- {type: OracleTopPMasker, top_p: 0.5}\n")
    evaluate = [
        "sparse-eval",
        model,
        "--text",
        text,
        "--out",
        tmp_path / "eval",
        "--maskers",
        "hash",
        "sink_local",
        mine,
    ]
    evaluate += ["--hat-weights", weights, "--densities", 0.3, 1.0, "--context", 48, "--windows", 3, "--lengths", 60]
    evaluate += ["--depths", 0.2, 0.9, "--needles", 2, "--decode-lengths", 40]
    assert main([str(word) for word in evaluate]) == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert format_table(report) in printed.out
    assert "100%" in printed.err
    assert (tmp_path / "eval" / "results.png").stat().st_size > 5000
    rows = {(row["maskers"], row["asked"]): row for row in report["results"]}
    assert list(rows) == [("dense", 1.0), *((m, d) for m in ("hash", "sink_local") for d in (0.3, 1.0)), ("mine", 0.0)]
    for name in ("hash", "sink_local"):
        assert rows[name, 1.0]["perplexity"] == pytest.approx(rows["dense", 1.0]["perplexity"], abs=1e-4)
        assert rows[name, 1.0]["needles"] == rows["dense", 1.0]["needles"]
        assert rows[name, 1.0]["density"] == 1
        assert 0.2 < rows[name, 0.3]["density"] < 0.6
        assert rows[name, 0.3]["decode"]["40"]["ratio"] > 0
        assert rows[name, 1.0]["decode"]["40"]["difference"] < 1e-4
    assert set(rows["dense", 1.0]["needles"]["60"]) == {"0.2", "0.9"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--maskers", "sinks"], "maskers 'sinks' are unknown"),
        (["--maskers", "hash"], "hash' need a file of weights (--hat-weights)"),
        (["--densities", "0"], "density 0.0"),
        (["--needles", "-1"], "needles is -1: it must be at least 0"),
        (["--context", "3"], "context is 3"),
        (["--context", "100000"], "valid: 4 or more, and a longer text"),
        (["--maskers", "{folder}/bad.yaml"], "masker_configs[0].type='Sink'"),
        (["--maskers", "{folder}/none.yaml"], "none.yaml"),
        (["--lengths", "100000"], "cannot be made: it is too short"),
    ],
)
def test_wrong_options_are_told(model, text, tmp_path, capsys, options, message):
    (tmp_path / "bad.yaml").write_text("- {type: Sink}\n")
    command = ["sparse-eval", model, "--text", text, "--out", tmp_path / "eval", "--context", 32, "--lengths", 60]
    assert main([str(word).replace("{folder}", str(tmp_path)) for word in [*command, *options]]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "MODEL, --checkpoint: one of the two is needed"),
        (["MODEL", "--checkpoint", "embedded:photos"], "MODEL, --checkpoint: one of the two is needed"),
        (["MODEL"], "--text is needed"),
        (["--checkpoint", "embedded:photos"], "--images is needed"),
        (["MODEL", "--text", "TEXT", "--bits", "0"], "bits=0"),
        (["MODEL", "--text", "TEXT", "--target", "2"], "target=2.0"),
        (["MODEL", "--text", "TEXT", "--context", "100000"], "0 windows of 100000"),
    ],
)
def test_wrong_options_of_train_hash_are_told(model, text, tmp_path, capsys, options, message):
    words = [{"MODEL": str(model), "TEXT": str(text)}.get(word, word) for word in options]
    extra = ["--context", "48"] if "--context" not in words else []
    assert main(["train-hash", *words, *extra, "--out", str(tmp_path / "hash")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hash").exists()


@pytest.mark.slow
def test_a_trained_model_finds_needles(tmp_path):
    """The documented way, small: facts that were never seen in training are looked up."""
    python_output("-m", "flextok", "needle-text", tmp_path / "train.txt", "--passages", 300)
    train = ["train-lm", tmp_path / "train.txt", "--out", tmp_path / "lm", "--steps", 3, "--layers", 1, "--width", 16]
    train += ["--heads", 2, "--kv-heads", 1, "--context", 64, "--batch-size", 4, "--vocab-size", 340]
    python_output("-m", "flextok", *train)
    evaluate = ["sparse-eval", tmp_path / "lm", "--text", tmp_path / "train.txt", "--out", tmp_path / "eval"]
    python_output("-m", "flextok", *evaluate, "--needles", 2, "--windows", 2, "--densities", 0.3)
    assert len(json.loads((tmp_path / "eval" / "results.json").read_text())["results"]) == 5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert AutoTokenizer.from_pretrained(tmp_path / "lm")
