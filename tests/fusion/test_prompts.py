"""Prompts, letter by letter."""

import json

import pytest
import torch
from safetensors import safe_open

from flextok.fusion.items import Item
from flextok.fusion.prompts import (
    MYRIAD_INSTRUCTION,
    MyriadPrompts,
    PromptTexts,
    WebQAPrompts,
    myriad_adjacency,
    myriad_segments,
    webqa_prompt,
)
from tests.support import RECORDED

WEBQA = """Answer the question based on general world knowledge. Provide a short and direct answer.

Q: capital of Italy?
A: Rome

Q: largest ocean?
A: Pacific

Q: who wrote Emma?
A:"""
MYRIAD = """Predict the [MASK] in the sentence in one word.

Q: Rome is the capital of [MASK].
Q: [MASK] is governed from Rome.
A: Italy

Q: Oslo is the capital of [MASK].
A:"""
EXAMPLES = [
    Item("0", ["Rome", "Roma"], ["capital of Italy?", "Italy's capital?"]),
    Item("1", ["Pacific"], ["largest ocean?"]),
]


def test_the_prompt_of_webqa():
    pairs = [("capital of Italy?", "Rome"), ("largest ocean?", "Pacific")]
    assert webqa_prompt("who wrote Emma?", pairs) == WEBQA
    assert WebQAPrompts().texts(["who wrote Emma?", "Emma's author?"], EXAMPLES).full() == [
        WEBQA,
        WEBQA.replace("who wrote Emma?", "Emma's author?"),
    ]


def test_without_examples_their_block_is_absent():
    instruction = WEBQA.partition("\n")[0]
    assert webqa_prompt("who wrote Emma?", []) == f"{instruction}\n\nQ: who wrote Emma?\nA:"


def test_without_an_instruction_there_is_only_the_question():
    texts = WebQAPrompts(instruction="").texts(["who wrote Emma?"], [])
    assert texts == PromptTexts(prefix="", wordings=["Q: who wrote Emma?"], tail="\nA:")
    assert texts.full() == ["Q: who wrote Emma?\nA:"]


def test_the_prompt_of_myriadlama_shows_every_wording_of_an_example():
    example = Item("0", ["Italy"], ["Rome is the capital of [MASK].", "[MASK] is governed from Rome."])
    assert MyriadPrompts().texts(["Oslo is the capital of [MASK]."], [example]).full() == [MYRIAD]
    other = MyriadPrompts(instruction="Based on the context, guess.").texts(["x"], [])
    assert other.full() == ["Based on the context, guess.\n\nQ: x\nA:"]


@pytest.mark.parametrize(
    ("generation", "line", "word"),
    [(" Jane Austen \nQ: next", "Jane Austen", "Jane"), ("", "", ""), ("\nlate", "", "late")],
)
def test_predictions_are_the_first_line_or_the_first_word(generation, line, word):
    assert WebQAPrompts().prediction(generation) == line
    assert MyriadPrompts().prediction(generation) == word


def test_segments_are_the_lines_and_their_roles():
    texts, roles = myriad_segments(["q0", "q1"], [(["e0", "e1"], "x"), (["f0"], "y")])
    assert texts == [MYRIAD_INSTRUCTION, "Q: e0", "Q: e1", "A: x", "Q: f0", "A: y", "Q: q0", "Q: q1"]
    assert roles == [
        ("instruction", None, None),
        ("few_shot_q", 0, 0),
        ("few_shot_q", 0, 1),
        ("few_shot_a", 0, None),
        ("few_shot_q", 1, 0),
        ("few_shot_a", 1, None),
        ("question", None, 0),
        ("question", None, 1),
    ]
    assert myriad_segments(["q"], [], instruction="") == (["Q: q"], [("question", None, 0)])


@pytest.mark.parametrize(("wordings", "examples"), [([], []), (["q"], [([], "x")])])
def test_segments_need_wordings(wordings, examples):
    with pytest.raises(ValueError, match="at least one wording"):
        myriad_segments(wordings, examples)


def test_who_sees_whom_is_as_recorded():
    with safe_open(RECORDED.parent / "paraphrase" / "masks.safetensors", "pt") as file:
        cases = [case for case in json.loads(file.metadata()["cases"]) if case.get("roles")]
        assert cases
        for case in cases:
            assert torch.equal(myriad_adjacency(case["roles"]), file.get_tensor(f"{case['name']}.adjacency"))


def test_the_rules_of_who_sees_whom():
    _, roles = myriad_segments(["q0", "q1"], [(["e0", "e1"], "x"), (["f0"], "y")])
    sees = myriad_adjacency(roles)
    assert sees.diagonal().all()
    assert sees[:, 0].all()
    assert sees[0].tolist() == [True] + [False] * 7
    assert sees[1].tolist() == [True, True, False, False, True, False, False, False]
    assert sees[3].tolist() == [True] * 6 + [False] * 2
    assert sees[7].tolist() == [True] * 6 + [False, True]


def test_no_segments_see_nothing_and_unknown_roles_are_an_error():
    assert myriad_adjacency([]).shape == (0, 0)
    with pytest.raises(ValueError, match="role 'answer' is unknown; valid: instruction"):
        myriad_adjacency([("answer", None, None)])
