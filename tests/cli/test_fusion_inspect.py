"""The command `fusion-inspect`: what it prints and draws is what the model was given and what it did."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from flextok.cli import main
from flextok.cli.fusion_inspection import inspect
from flextok.cli.fusion_questions import read_questions
from flextok.cli.fusion_run import load_answerer
from flextok.cli.fusion_settings import read_settings
from flextok.fusion.items import Item
from flextok.fusion.results import read_results
from tests.attention.test_visualize import parsed
from tests.fusion.toy import write_items


def shown(capsys, *arguments):
    assert main(["fusion-inspect", *arguments]) == 0
    return capsys.readouterr().out


def is_drawn(path):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels.shape[0] > 200 and pixels.shape[1] > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_prompt_mask_answer_and_attention_are_shown(toy_questions, tmp_path, capsys):
    overrides = [*toy_questions, f"fusion.out={tmp_path}"]
    text = shown(capsys, *overrides, "--item", "0", "--budget", "200")
    assert text.startswith("question 0, uuid france\n\nQ: what is the capital of france?Q: france's capital is?Q: name")
    parts = re.findall(r"^S\d = (wording \d): tokens (\d+) to (\d+)$", text, flags=re.MULTILINE)
    assert [name for name, *_ in parts] == ["wording 1", "wording 2", "wording 3"]
    spans = [(int(first), int(last) + 1) for _, first, last in parts]
    start = int(re.search(r"^G0 = token (\d+), the first that sees all of them$", text, flags=re.MULTILINE)[1])
    assert spans[-1][1] == start
    _, positions, cells = parsed(text)
    assert positions == list(range(len(cells)))
    mask = torch.tensor(cells)
    expected = torch.zeros_like(mask)
    for first, end in spans:
        expected[first:end, first:end] = 1
    expected[start:] = 1
    assert torch.equal(mask, expected.tril())
    # Prompt, cue and the six tokens of the answer.
    assert len(mask) == start + 3 + 6

    assert main(["fuse", *overrides, "fusion.limit=1"]) == 0
    capsys.readouterr()
    [row] = read_results(tmp_path / "fusion-3.feather")
    assert f"answer {row['prediction']!r}, right: paris" in text
    shares = dict(re.findall(r"^(wording \d|tail and answer) +([\d.]+)%", text, flags=re.MULTILINE))
    assert list(shares) == ["wording 1", "wording 2", "wording 3", "tail and answer"]
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.3)
    for name in ("mask.png", "attention.png"):
        assert is_drawn(tmp_path / "item-0" / name)


def test_separators_and_a_prefix_are_shown(toy_questions, tmp_path, capsys):
    arguments = ["fusion.data.prompts.instruction=Answer.", "fusion.separator=' | '", "--out", str(tmp_path / "here")]
    toy = [override for override in toy_questions if "instruction" not in override]
    text = shown(capsys, *toy, *arguments, "--item", "2")
    assert "S1 = prefix: tokens 0 to" in text
    assert "S2 = wording 1" in text
    assert re.search(r"^separators +\d", text, flags=re.MULTILINE)
    assert is_drawn(tmp_path / "here" / "mask.png")
    arguments[1:2] = ["fusion.separator=' | '", "fusion.gap_keys=hidden"]
    assert not re.search(r"^separators", shown(capsys, *toy, *arguments, "--item", "2"), flags=re.MULTILINE)


def test_a_weight_draws_attention_to_a_wording(toy_questions, tmp_path):
    settings = read_settings([*toy_questions, f"fusion.out={tmp_path}"])
    question, answerer = read_questions(settings).questions[0], load_answerer(settings)

    def share(weights):
        groups = dict(inspect(answerer, question.texts, weights).groups())
        return np.mean(groups["wording 2"])

    assert share([1.0, 0.0, 1.0]) == 0 < share([1.0, 1.0, 1.0]) < share([1.0, 4.0, 1.0])


def test_odd_letters_are_drawn(toy_questions, tmp_path, capsys):
    words = ["what costs $5 and $x_{1$?", "多少钱 " * 30]
    items = write_items(tmp_path / "odd.jsonl", [Item("odd $uuid_$", ["x"], words)])
    toy = [override for override in toy_questions if "fusion.data.path" not in override]
    shown(capsys, *toy, f"fusion.data.path={items}", "--out", str(tmp_path))
    assert is_drawn(tmp_path / "attention.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--item", "5"], "--item 5: valid are 0 to 4"),
        (["--item", "-1"], "--item -1: valid are 0 to 4"),
        (["--budget", "0"], "--budget 0: valid is 1 position or more"),
        (["fusion.method=avg"], "fusion.method=avg: only fusion puts wordings in one prompt"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(arguments, message, toy_questions, capsys, monkeypatch):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("flextok.fusion.language_model.load_language_model", load)
    assert main(["fusion-inspect", *toy_questions, *arguments]) == 1
    assert message in capsys.readouterr().err
