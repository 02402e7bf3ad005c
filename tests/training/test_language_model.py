"""Small language models from scratch: what they learn from, that they learn, and that a kill changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextok.fusion import generate_fused, pack_prompts
from flextok.training import language_model
from flextok.training.language_batch import IGNORED, examples_of_step, make_batch
from flextok.training.language_data import Example, encode_documents, read_documents, train_tokenizer
from flextok.training.language_model import build_language_model, lr_factor, train_language_model
from flextok.training.language_settings import LanguageModelSettings
from tests.support import REPOSITORY

TINY = LanguageModelSettings(
    layers=1,
    width=16,
    heads=2,
    kv_heads=1,
    vocab_size=280,
    context=64,
    steps=8,
    batch_size=4,
    wordings=3,
    word_dropout=0.1,
)
CPU = torch.device("cpu")
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12


def items(count=6):
    return [
        {"uuid": f"{n}", "answers": [f"{n * 7}", "other"], "paraphrases": [f"What is {n}?", f"{n}?", f"Say {n}, now!"]}
        for n in range(count)
    ]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items()))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def train(data, folder, settings=TINY, **options):
    return train_language_model([data], folder, settings, **{"device": CPU, "save_every": 3, **options})


def result(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": 0}, "layers=0: it must be at least 1"),
        ({"steps": 0}, "steps=0"),
        ({"wordings": 0}, "wordings=0"),
        ({"width": 18, "heads": 4}, r"width=18: it must be heads=4 times an even number"),
        ({"width": 6, "heads": 2}, r"width=6: it must be heads=2 times an even number"),
        ({"heads": 4, "kv_heads": 3}, r"kv_heads=3: it must divide heads=4"),
        ({"vocab_size": 258}, "vocab_size=258: it must be at least 259"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"word_dropout": 1.0}, "word_dropout=1.0"),
        ({"family": "gpt2"}, "family='gpt2': valid are llama, qwen2, mistral"),
        ({"weights": "fp8"}, "weights='fp8': valid are fp32, fp16, bf16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [lr_factor(step, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[100] == pytest.approx(0)
    assert lr_factor(0, 1) == 1


# --- data -------------------------------------------------------------------------------------------------------------


def test_every_wording_is_a_document(questions, text):
    documents = read_documents([questions, text])
    assert len(documents) == 6 * 3 + 1
    assert documents[4].text == "Q: 1?\nA: 7\n"
    assert documents[4].beginnings == ["Q: 1?", "Q: What is 1?", "Q: Say 1, now!"]
    assert documents[-1].text == TEXT


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-8 text"),
        ("a.jsonl", b"\n", "a.jsonl: holds no item"),
        ("a.jsonl", b"{", "a.jsonl, line 1: is no JSON"),
        ("a.jsonl", b'\n{"uuid": "1", "answers": ["a"]}', "a.jsonl, line 2: the field paraphrases is missing"),
        ("a.jsonl", b'{"uuid": "1", "answers": [], "paraphrases": ["a"]}', "answers=.* needs at least one text"),
    ],
)
def test_files_without_anything_to_learn_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_writes_any_text_and_keeps_the_cue_apart(questions):
    documents = read_documents([questions])
    tokenizer = train_tokenizer(documents, vocab_size=300, context=64)
    assert 259 <= len(tokenizer) <= 300
    for text in ("Zoë → 東京\t🦊", "a  b\n\nc ", "2026"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("\n", add_special_tokens=False)["input_ids"]) == 1
    # Fusion tokenises a wording and what follows it apart.
    apart = tokenizer("Q: What is 3?")["input_ids"] + tokenizer("\nA: 21\n", add_special_tokens=False)["input_ids"]
    assert tokenizer("Q: What is 3?\nA: 21\n")["input_ids"] == apart


@pytest.mark.parametrize("context", [1, 7, 64, 5000])
def test_no_token_of_a_text_is_lost_where_it_is_cut(text, context):
    documents = read_documents([text])
    tokenizer = train_tokenizer(documents, vocab_size=280, context=64)
    pieces = [example.beginnings[0] for example in encode_documents(documents, tokenizer, context=context)]
    whole = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    assert [token for piece in pieces for token in piece[1:]] == whole[1:]
    assert all(2 <= len(piece) <= context + 1 for piece in pieces)
    assert [piece[0] for piece in pieces[1:]] == [piece[-1] for piece in pieces[:-1]]


def test_a_question_is_never_cut(questions, tmp_path):
    with pytest.raises(ValueError, match=r"questions.jsonl, item 0 has \d+ tokens; context=8 must be at least that"):
        train(questions, tmp_path / "out", replace(TINY, context=8))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_every_example_comes_once_in_an_epoch_and_steps_do_not_depend_on_each_other():
    examples = [Example([[n, 0]], []) for n in range(10)]
    options = {"batch_size": 4, "wordings": 1, "word_dropout": 0.0, "seed": 0}
    seen = [e.beginnings[0][0] for step in range(5) for e in examples_of_step(examples, step, **options)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert [e.beginnings[0][0] for e in examples_of_step(examples, 3, **options)] == seen[12:16]
    assert seen[:4] != [e.beginnings[0][0] for e in examples_of_step(examples, 0, **{**options, "seed": 1})]


def test_other_wordings_stand_beside_the_own_one_in_half_of_the_steps():
    examples = [Example([[n, k] for k in range(5)], [9]) for n in range(6)]
    steps = [
        examples_of_step(examples, step, batch_size=3, wordings=4, word_dropout=0.0, seed=0) for step in range(200)
    ]
    assert all(len({len(example.beginnings) for example in step}) == 1 for step in steps)
    counts = [len(step[0].beginnings) for step in steps]
    assert set(counts) == {1, 2, 3, 4}
    assert 70 < counts.count(1) < 130
    for step in steps:
        for example in step:
            assert example.beginnings[0][1] == 0
            assert len({tuple(wording) for wording in example.beginnings}) == len(example.beginnings)


def test_left_out_words_are_others_in_every_step():
    examples = [Example([list(range(100)), list(range(0, 200, 2))], [7])]
    options = {"batch_size": 1, "wordings": 2, "word_dropout": 0.3, "seed": 0}
    shown = [examples_of_step(examples, step, **options)[0].beginnings for step in range(20)]
    assert all(alone == [list(range(100))] for alone in shown if len(alone) == 1)
    thinned = [wordings for wordings in shown if len(wordings) == 2]
    assert len({tuple(own) for own, _ in thinned}) == len(thinned) > 5
    for own, other in thinned:
        assert own[0] == other[0] == 0
        assert own == sorted(own)
        assert 50 < len(own) < 90


def test_a_row_of_several_wordings_is_what_fusion_reads(questions):
    documents = read_documents([questions])
    tokenizer = train_tokenizer(documents, vocab_size=280, context=64)
    model = build_language_model(TINY, tokenizer).eval()
    example, other = encode_documents(documents, tokenizer, context=64)[3:5]
    single = Example(other.beginnings[:1], other.ending)
    batch = make_batch([example, single], pad_token_id=tokenizer.pad_token_id, device=CPU)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids).logits
    packed = pack_prompts(documents[3].beginnings, tokenizer, tail=documents[3].ending)
    fused = generate_fused(model, [packed], max_new_tokens=1, return_logits=True).prefill_logits[0]
    torch.testing.assert_close(logits[0], fused[:-1], atol=1e-5, rtol=1e-4)
    # From each token the next is predicted, but for the last ones of the wordings, which nothing follows.
    expected = packed.input_ids[1:].clone()
    expected[[end - 1 for _, end in packed.spans]] = IGNORED
    assert torch.equal(batch.labels[0], expected)
    # A wording alone is a text like any other.
    ids = tokenizer(documents[4].text, return_tensors="pt")["input_ids"]
    counted = batch.labels[1] != IGNORED
    assert torch.equal(batch.labels[1][counted], ids[0, 1:])
    with torch.no_grad():
        torch.testing.assert_close(logits[1][counted], model(ids).logits[0, :-1], atol=1e-5, rtol=1e-4)


def test_full_causal_rows_need_no_mask():
    options = {"pad_token_id": 0, "device": CPU}
    full = [Example([[1, 2, 3]], []), Example([[4, 5, 6]], [])]
    assert make_batch(full, **options).mask is None
    assert make_batch([*full, Example([[1, 2]], [])], **options).mask is not None


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_the_folder_is_one_for_transformers(family, weights, questions, tmp_path):
    settings = replace(TINY, family=family, weights=weights, steps=2)
    record = train(questions, tmp_path / "out", settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.model_type == family
    assert (model.dtype, model.config.max_position_embeddings) == (torch.float32, 64)
    assert model.num_parameters() == record["parameters"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    bytes_per_weight = (tmp_path / "out" / "model.safetensors").stat().st_size / record["parameters"]
    assert bytes_per_weight < (2.6 if weights == "fp16" else 4.6)  # Tied weights are there once.
    assert tokenizer("Q: 1?")["input_ids"][0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == json.loads(json.dumps(record))
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_a_text_is_learned_and_what_is_measured_is_what_is_loaded(text, tmp_path):
    settings = replace(TINY, steps=120, lr=1e-2, weights="fp16", context=32)
    record = train(text, tmp_path / "out", settings, valid=[text])
    assert record["losses"][0][1] > 4
    assert record["valid"]["loss"] < 1.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pieces = [e.beginnings[0] for e in encode_documents(read_documents([text]), tokenizer, context=32)]
    with torch.no_grad():
        losses = [float(model(torch.tensor([p]), labels=torch.tensor([p])).loss) * (len(p) - 1) for p in pieces]
    assert sum(losses) / sum(len(p) - 1 for p in pieces) == pytest.approx(record["valid"]["loss"], abs=1e-3)
    assert record["valid"]["tokens"] == sum(len(p) - 1 for p in pieces)


def test_autocast_trains_as_well(text, tmp_path):
    record = train(text, tmp_path / "out", replace(TINY, precision="bf16", steps=40, lr=1e-2))
    assert record["losses"][-1][1] < record["losses"][0][1] - 1


def test_another_seed_gives_another_model(questions, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(questions, tmp_path / name, replace(TINY, seed=seed))
    a, b, c = (result(tmp_path / name) for name in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


# --- going on ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the code catches it."""


@pytest.mark.parametrize("at_step", [1, 4, 6, 8])
def test_a_training_that_was_killed_ends_as_if_it_had_not_been(at_step, questions, tmp_path, monkeypatch):
    train(questions, tmp_path / "whole", valid=[questions])
    step = language_model._Run._train_step

    def die(run):
        if run.step == at_step:
            raise Killed
        return step(run)

    if at_step < TINY.steps:
        monkeypatch.setattr(language_model._Run, "_train_step", die)
    else:  # While the result is being written.
        monkeypatch.setattr(language_model, "_write_atomically", lambda *arguments: die(language_model._Run))
        monkeypatch.setattr(language_model._Run, "step", at_step, raising=False)
    with pytest.raises(Killed):
        train(questions, tmp_path / "killed", valid=[questions])
    assert (tmp_path / "killed" / "checkpoint.pt").exists() == (at_step > 3)
    monkeypatch.undo()
    (tmp_path / "killed" / ".checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    train(questions, tmp_path / "killed", valid=[questions])
    (tmp_path / "killed" / ".checkpoint.pt.tmp").unlink(missing_ok=True)
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_a_finished_training_is_left_alone(questions, tmp_path, monkeypatch):
    record = train(questions, tmp_path / "out")
    before = result(tmp_path / "out")
    monkeypatch.setattr(language_model, "_Run", None)
    assert train(questions, tmp_path / "out") == json.loads(json.dumps(record))
    assert result(tmp_path / "out") == before


def test_a_folder_with_something_else_is_refused(questions, text, tmp_path):
    train(questions, tmp_path / "out")
    with pytest.raises(ValueError, match="holds a training with another width, data_sha256; valid: another folder"):
        train(text, tmp_path / "out", replace(TINY, width=32))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files, but neither checkpoint.pt nor training.json"):
        train(text, tmp_path / "full")


def test_global_random_states_are_left_alone(questions, tmp_path):
    before = torch.get_rng_state()
    train(questions, tmp_path / "out", replace(TINY, steps=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_real_kill_changes_nothing(questions, tmp_path):
    sizes = ("--layers", "1", "--width", "16", "--heads", "2", "--vocab-size", "280", "--batch-size", "4")
    steps = ("--steps", "400", "--wordings", "3", "--save-every", "7", "--device", "cpu")

    def command(folder):
        return [sys.executable, "-m", "flextok", "train-lm", str(questions), "--out", str(folder), *sizes, *steps]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path / "killed"), cwd=REPOSITORY, env=environment)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    for name in ("killed", "whole"):
        subprocess.run(command(tmp_path / name), cwd=REPOSITORY, env=environment, check=True, timeout=300)
    (tmp_path / "killed" / ".checkpoint.pt.tmp").unlink(missing_ok=True)
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
