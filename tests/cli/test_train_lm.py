"""`flextok train-lm`: the options reach the training, and mistakes are told in one line."""

import json
from dataclasses import fields

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextok.cli import build_parser, main
from flextok.embedded import embedded_file
from flextok.training.language_settings import LanguageModelSettings

TINY = ("--layers", "1", "--width", "16", "--heads", "2", "--kv-heads", "1", "--vocab-size", "280")
QUICK = (*TINY, "--steps", "4", "--batch-size", "4", "--device", "cpu")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a small model. " * 20)
    return path


def test_every_setting_is_an_option_with_its_default():
    args = build_parser("train-lm").parse_args(["train-lm", "a.txt", "--out", "b"])
    assert LanguageModelSettings(**{f.name: getattr(args, f.name) for f in fields(LanguageModelSettings)}) == (
        LanguageModelSettings()
    )


def test_text_and_questions_together(text, tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"uuid": "a", "answers": ["4"], "paraphrases": ["2 + 2?", "What is 2 + 2?"]}))
    out = tmp_path / "out"
    options = ("--family", "mistral", "--wordings", "2", "--valid", str(questions), "--context", "32")
    assert main(["train-lm", str(text), str(questions), "--out", str(out), *QUICK, *options]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: " in printed
    assert "held out: loss" in printed
    record = json.loads((out / "training.json").read_text())
    assert record["data"] == ["text.txt", "q.jsonl"]
    assert (record["settings"]["family"], record["settings"]["wordings"], record["settings"]["context"]) == (
        *("mistral", 2, 32),
    )
    assert len(record["losses"]) == 4
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("Q: 2 + 2?\nA:", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_a_file_of_the_package_can_be_named():
    assert embedded_file("embedded:questions/train.jsonl").is_file()
    assert str(embedded_file("my/questions.jsonl")) == "my/questions.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--width", "18"), "error: width=18: it must be heads=2 times an even number"),
        (("--vocab-size", "100"), "error: vocab_size=100: it must be at least 259"),
        (("--context", "0"), "error: context=0: it must be at least 1"),
        (("--save-every", "0"), "error: --save-every is 0: it must be at least 1"),
        (("--device", "abacus"), "error: --device='abacus': not usable here"),
        (("--valid", "missing.txt"), "error: [Errno 2] No such file or directory: 'missing.txt'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(options, message, text, tmp_path, capsys):
    assert main(["train-lm", str(text), "--out", str(tmp_path / "out"), *QUICK, *options]) == 1
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def test_missing_data_and_out_are_told(tmp_path, capsys):
    assert main(["train-lm", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert "there is no such file; valid: JSON lines" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train-lm", "a.txt"])
    assert "required: --out" in capsys.readouterr().err
