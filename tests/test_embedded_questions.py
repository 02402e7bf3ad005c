"""The questions that come with the package, and the language model that was trained on them."""

import filecmp
import json
import re
from collections import Counter

import pytest
import torch

from flextok.embedded import embedded_file, embedded_language_model, embedded_models
from flextok.embedded.questions import make
from flextok.fusion import generate_ensemble, generate_fused, pack_prompts
from flextok.fusion.items import read_items
from flextok.training.language_data import data_sha256, read_documents

FOLDER = embedded_language_model()
TAIL = "\nA:"


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def test_items():
    return read_items(FOLDER / "test.jsonl")


def accuracy(loaded, items, method):
    """Share of right answers, in percent; `origin` is the first wording alone, the others see the first five."""
    model, tokenizer = loaded
    options = {
        "max_new_tokens": 16,
        "eos_token_ids": [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"]],
        "pad_token_id": tokenizer.pad_token_id,
    }
    right = 0
    for start in range(0, len(items), 64):
        batch = items[start : start + 64]
        wordings = [
            [f"Q: {wording}" for wording in item.paraphrases[: 1 if method == "origin" else 5]] for item in batch
        ]
        if method in ("origin", "fusion"):
            prompts = [pack_prompts(texts, tokenizer, tail=TAIL) for texts in wordings]
            output = generate_fused(model, prompts, **options)
        else:
            sets = [[tokenizer(text + TAIL)["input_ids"] for text in texts] for texts in zip(*wordings, strict=True)]
            output = generate_ensemble(model, sets, method=method, **options)
        answers = [tokenizer.decode(ids).partition("\n")[0].strip() for ids in output.token_lists()]
        right += sum(answer in item.answers for answer, item in zip(answers, batch, strict=True))
    return 100 * right / len(items)


def test_the_stored_questions_are_those_of_the_tables(tmp_path):
    make.main(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert filecmp.cmp(tmp_path / name, FOLDER / name, shallow=False), "python -m flextok.embedded.questions.make"


def test_no_question_of_the_test_was_learned(test_items):
    train_items = read_items(FOLDER / "train.jsonl")
    learned = {wording for item in train_items for wording in item.paraphrases}
    tested = [wording for item in test_items for wording in item.paraphrases]
    assert learned.isdisjoint(tested)
    assert len(set(tested)) == len(tested)
    assert [item.answers for item in train_items] == [item.answers for item in test_items]
    assert {len(item.paraphrases) for item in test_items} == {make.KNOWN + make.NEW}
    # Whoever always gives the most frequent answer is right this often.
    (_, most), *_ = Counter(item.answers[0] for item in test_items).most_common(1)
    assert most / len(test_items) < 0.06


def test_wordings_differ_and_ask_about_something():
    import yaml

    for relation, groups in yaml.safe_load((FOLDER / "wordings.yaml").read_text()).items():
        wordings = groups["train"] + groups["test"]
        assert len(set(wordings)) == len(wordings) >= 20, relation
        assert all(wording.count("{x}") == 1 for wording in wordings), relation


def test_the_language_model_is_no_tokenizer_of_images():
    assert embedded_file("embedded:questions") == FOLDER
    assert "questions" not in embedded_models()
    with pytest.raises(ValueError, match="no language model 'answers' comes with the package; valid are questions"):
        embedded_language_model("answers")


def test_the_model_was_trained_on_the_stored_questions(loaded):
    record = json.loads((FOLDER / "training.json").read_text())
    model, tokenizer = loaded
    assert record["data_sha256"] == data_sha256(read_documents([FOLDER / "train.jsonl"]))
    assert (record["parameters"], record["vocab_size"]) == (model.num_parameters(), len(tokenizer))
    assert model.dtype == torch.float32
    assert sum(path.stat().st_size for path in FOLDER.glob("*.*")) < 1.8e6


def reported():
    """`{method: accuracy}` of the card."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \|$", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    return {method: float(value) for method, value in rows}


def test_several_wordings_answer_more_than_one(loaded, test_items):
    some = test_items[::5]
    origin, averaged = (accuracy(loaded, some, method) for method in ("origin", "avg"))
    assert 30 < origin < averaged - 5 < 95


@pytest.mark.slow
@pytest.mark.parametrize("method", ["origin", "fusion", "avg", "max"])
def test_the_card_says_what_is_measured(method, loaded, test_items):
    # Another processor may round another way, and turn an answer or two.
    assert accuracy(loaded, test_items, method) == pytest.approx(reported()[method], abs=1)
