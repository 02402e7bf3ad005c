"""Questions reworded by a language model: what is drawn, what is written, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flextok.cli import main
from flextok.fusion.items import Item, read_items
from flextok.fusion.rewording import NUM_ROUNDS, Rewriter, rewording_prompt, write_rewordings
from flextok.fusion.rewording_examples import EXAMPLE_SETS
from tests.fusion.language_models import letter_tokenizer, save_language_model, tiny_llama
from tests.support import REPOSITORY

ITEMS = [Item(f"u{n}", [f"answer {n}"], [f"what is number {n}?", "not shown"]) for n in range(4)]


@pytest.fixture(scope="module")
def language_model():
    tokenizer = letter_tokenizer()
    return tiny_llama(len(tokenizer)), tokenizer


@pytest.fixture
def rewriter(language_model):
    return Rewriter(*language_model, max_new_tokens=6)


class Generates:
    """A model that answers each prompt with the next of some texts, and keeps what it was asked."""

    def __init__(self, tokenizer, *texts):
        self.tokenizer, self.texts, self.device, self.config = tokenizer, texts, "cpu", SimpleNamespace()

    def generate(self, ids, **options):
        self.ids, self.options = ids, options
        new = [self.tokenizer(text)["input_ids"] for text in self.texts]
        longest = max(map(len, new))
        return torch.cat([ids, torch.tensor([[*row, *[2] * (longest - len(row))] for row in new])], 1)


def test_every_round_shows_other_examples():
    prompts = {rewording_prompt("why?", number) for number in range(NUM_ROUNDS)}
    assert len(prompts) == NUM_ROUNDS == 5
    assert all(prompt.endswith("\n\nQuestion: why?\nRephrased:") for prompt in prompts)
    questions = [question for pairs in EXAMPLE_SETS for question, _ in pairs]
    assert len(set(questions)) == len(questions)
    assert all(question in rewording_prompt("why?", n) for n, pairs in enumerate(EXAMPLE_SETS) for question, _ in pairs)


def test_the_first_line_of_each_round_is_a_wording(language_model):
    model = Generates(language_model[1], " a new one? \nQuestion: more", "\nlate", " third", "", " fifth\n")
    item = Rewriter(model, language_model[1])(ITEMS[0])
    assert item == Item("u0", ["answer 0"], ["what is number 0?", "a new one?", "third", "fifth"])


def test_sampling_is_as_asked_for_and_prompts_end_together(language_model):
    model = Generates(language_model[1], *["x"] * 5)
    Rewriter(model, language_model[1])(ITEMS[0])
    wanted = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0, "max_new_tokens": 30, "pad_token_id": 2}
    assert {name: model.options[name] for name in wanted} == wanted
    mask = model.options["attention_mask"].bool()
    texts = [language_model[1].decode(row[keep]) for row, keep in zip(model.ids, mask, strict=True)]
    assert texts == [rewording_prompt("what is number 0?", number) for number in range(5)]
    assert mask[:, -1].all()
    assert not mask.all()


def test_a_prompt_beyond_what_the_model_reads_is_an_error(language_model):
    model = Generates(language_model[1], *["x"] * 5)
    longest = max(len(language_model[1](rewording_prompt(ITEMS[0].paraphrases[0], n))["input_ids"]) for n in range(5))
    model.config.max_position_embeddings = longest + 30
    Rewriter(model, language_model[1])(ITEMS[0])
    model.config.max_position_embeddings -= 1
    with pytest.raises(ValueError, match=f"item 'u0': prompt and new tokens are {longest + 30}, and the model reads"):
        Rewriter(model, language_model[1])(ITEMS[0])
    Rewriter(model, language_model[1], num_examples=3)(ITEMS[0])
    assert all("night watch" not in language_model[1].decode(row) for row in model.ids[1:])


def test_what_is_drawn_depends_on_seed_and_uuid_alone(language_model, rewriter):
    before = torch.random.get_rng_state()
    first = rewriter(ITEMS[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    rewriter(ITEMS[1])
    assert rewriter(ITEMS[0]) == first
    assert Rewriter(*language_model, max_new_tokens=6, seed=1)(ITEMS[0]) != first
    assert rewriter(Item("other", ITEMS[0].answers, ITEMS[0].paraphrases)).paraphrases != first.paraphrases


def test_the_file_is_one_of_items_and_a_second_call_does_nothing(tmp_path, rewriter):
    file, reported = tmp_path / "new.jsonl", []
    assert write_rewordings(file, ITEMS, rewriter, model_name="tiny", report=reported.append) == 4
    assert sum(reported) == 4
    assert read_items(file) == [rewriter(item) for item in ITEMS]
    made = json.loads(file.read_text().splitlines()[0])["rewording"]
    assert made == {"model": "tiny", "num_rounds": 5, "num_examples": 4} | {
        **{"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 6, "seed": 0}
    }
    before = file.read_bytes()
    assert write_rewordings(file, ITEMS, rewriter, model_name="tiny") == 0
    assert file.read_bytes() == before


def test_a_cut_off_file_becomes_what_it_would_have_been(tmp_path, rewriter):
    file = tmp_path / "new.jsonl"
    write_rewordings(file, ITEMS, rewriter, model_name="tiny")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert write_rewordings(file, ITEMS, rewriter, model_name="tiny") in (2, 3)
    assert file.read_bytes() == whole


def test_the_questions_themselves_are_not_overwritten(tmp_path, rewriter):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"uuid": "u0", "answers": ["a"], "paraphrases": ["q"]}')  # without an end of the line
    with pytest.raises(ValueError, match="line 1: made with None"):
        write_rewordings(file, read_items(file), rewriter, model_name="tiny")
    assert len(read_items(file)) == 1


def test_a_file_made_otherwise_is_refused(tmp_path, language_model, rewriter):
    file = tmp_path / "new.jsonl"
    write_rewordings(file, ITEMS[:1], rewriter, model_name="tiny")
    with pytest.raises(ValueError, match="line 1: made with .*'tiny'.*, this call has .*'other'"):
        write_rewordings(file, ITEMS, rewriter, model_name="other")
    with pytest.raises(ValueError, match="uuid='u0' is none of the items"):
        write_rewordings(file, ITEMS[1:], rewriter, model_name="tiny")
    assert len(read_items(file)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        *({"num_rounds": 0}, {"num_rounds": 6}, {"num_examples": -1}, {"num_examples": 5}),
        *({"temperature": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}),
    ],
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rewriter(SimpleNamespace(), SimpleNamespace(), **wrong)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_language_model(tmp_path / "model")
    lines = [{"uuid": item.uuid, "answers": item.answers, "paraphrases": item.paraphrases} for item in ITEMS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def arguments(folder, *more):
    data = ["fusion/data=jsonl", f"fusion.data.path={folder / 'questions.jsonl'}"]
    options = ["--model", str(folder / "model"), "--max-new-tokens", "4", "--device", "cpu", *more]
    return ["fusion-paraphrase", str(folder / "new.jsonl"), *data, *options]


def test_the_command_writes_items(folder, capsys):
    assert main(arguments(folder, "--limit", "2", "--rounds", "3")) == 0
    items = read_items(folder / "new.jsonl")
    assert [item.uuid for item in items] == ["u0", "u1"]
    assert items[0].paraphrases[0] == "what is number 0?"
    assert 1 <= len(items[0].paraphrases) <= 4
    assert "2 questions, 2 of them now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--rounds", "9"], "num_rounds=9"),
        (["fusion.data.pth=x"], "pth"),
        (["--model", "no_such_folder/at/all"], "the language model 'no_such_folder/at/all' cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, more, message):
    command = arguments(folder)
    assert main([*command, *more] if more[0].startswith("-") else [*command[:2], *more, *command[2:]]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


KILL = """
import os, signal, sys
from flextok.cli import main
from flextok.fusion.journal import Journal

add = Journal.add
count = 0

def counted(self, records):
    global count
    count += 1
    if count == 3:
        self._file.write(b'{"uuid": "u2", "ans')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, records)

Journal.add = counted
main(sys.argv[1:])
"""


@pytest.mark.slow  # starts a process that imports transformers; the file that is cut off is its quick sibling
def test_a_kill_costs_one_item(folder):
    command = [sys.executable, "-c", KILL, *arguments(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (folder / "new.jsonl").read_bytes().count(b"\n") == 2
    assert main(arguments(folder)) == 0
    resumed = (folder / "new.jsonl").read_bytes()
    Path(folder / "new.jsonl").unlink()
    assert main(arguments(folder)) == 0
    assert (folder / "new.jsonl").read_bytes() == resumed
    assert [item.uuid for item in read_items(folder / "new.jsonl")] == [item.uuid for item in ITEMS]
