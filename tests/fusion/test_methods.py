"""All methods on real batches of questions with different numbers of wordings."""

from dataclasses import replace

import pytest
import torch

from flextok.fusion import Beams, Greedy, MissingTailWarning, Sampling
from flextok.fusion.answerer import Answerer, stop_token_ids
from flextok.fusion.methods import METHODS, NEEDS_WEIGHTS, TAKES_WEIGHTS, MethodOptions
from flextok.fusion.prompts import WebQAPrompts
from tests.fusion.toy import ITEMS, toy_model, toy_tokenizer

OPTIONS = MethodOptions(
    method="fusion",
    max_new_tokens=6,
    positions="restart",
    separator=None,
    shared_prefix=True,
    shared_tail=True,
    gap_keys="visible",
    backend="auto",
    strategy=Greedy(),
    confidence_samples=0,
)
PROMPTS = WebQAPrompts(instruction="Answer.")
QUESTIONS = [PROMPTS.texts(item.paraphrases, ITEMS[:1]) for item in ITEMS]
WEIGHTS = [[0.2, 0.9, 0.4], [1.0], [0.0, 0.5], [0.0, 0.0, 0.0], [0.7, 0.1]]


@pytest.fixture(scope="module")
def toy():
    tokenizer = toy_tokenizer()
    return toy_model(len(tokenizer)), tokenizer


def answerer(toy, **changes):
    return Answerer(*toy, replace(OPTIONS, **changes))


def plain(answers):
    """All but the time."""
    return [[(a.text, a.num_prompt_tokens, a.num_new_tokens, a.samples) for a in row] for row in answers]


def weights_for(method):
    return WEIGHTS if method in NEEDS_WEIGHTS else None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", [Greedy(), Sampling(seed=3), Beams(beams=2)], ids=["greedy", "sampling", "beams"])
def test_a_batch_of_ragged_questions_is_answered_as_one_by_one(toy, method, strategy):
    subject, weights = answerer(toy, method=method, strategy=strategy), weights_for(method)
    together = plain(subject.answer(QUESTIONS, weights))
    alone = [
        plain(subject.answer([question], None if weights is None else [weights[number]]))[0]
        for number, question in enumerate(QUESTIONS)
    ]
    assert together == alone
    expected = [len(item.paraphrases) if method == "per_prompt" else 1 for item in ITEMS]
    assert [len(row) for row in together] == expected
    assert len({row[0][0] for row in together}) > 2, "the answers of the toy should differ"


@pytest.mark.parametrize("method", METHODS)
def test_one_wording_is_answered_alike_by_every_method(toy, method):
    single = [replace(question, wordings=question.wordings[:1]) for question in QUESTIONS]
    weights = [[0.5]] * len(single) if method in NEEDS_WEIGHTS else None
    origin = answerer(toy, method="origin").answer(QUESTIONS)
    assert plain(answerer(toy, method=method).answer(single, weights)) == plain(origin)


def test_the_answer_to_each_wording_is_that_of_the_wording_alone(toy):
    rows = plain(answerer(toy, method="per_prompt").answer(QUESTIONS))
    for question, row in zip(QUESTIONS, rows, strict=True):
        for wording, answer in zip(question.wordings, row, strict=True):
            alone = answerer(toy, method="origin").answer([replace(question, wordings=[wording])])
            assert plain(alone)[0] == [answer]


def test_a_prefix_is_read_once_or_with_each_wording(toy):
    shared, repeated = (answerer(toy, shared_prefix=shared).packed(QUESTIONS[0]) for shared in (True, False))
    prefix = shared.spans[0][1]
    assert shared.has_prefix
    assert not repeated.has_prefix
    assert len(repeated) == len(shared) + 2 * prefix
    [[once]] = answerer(toy).answer(QUESTIONS[:1])
    [[thrice]] = answerer(toy, shared_prefix=False).answer(QUESTIONS[:1])
    assert (once.num_prompt_tokens, thrice.num_prompt_tokens) == (len(shared), len(repeated))


def test_without_a_tail_each_wording_keeps_the_cue(toy):
    _, tokenizer = toy
    cue = tokenizer("\nA:")["input_ids"]
    with pytest.warns(MissingTailWarning):
        packed = answerer(toy, shared_tail=False).packed(QUESTIONS[0])
    assert packed.fusion_start == len(packed)
    for start, end in packed.wording_spans:
        assert packed.input_ids[start:end].tolist()[-len(cue) :] == cue


def test_another_tail_and_a_separator_are_in_the_prompt(toy):
    _, tokenizer = toy
    packed = answerer(toy, separator=" | ").packed(replace(QUESTIONS[0], tail="\nAnswer:"))
    assert tokenizer.decode(packed.input_ids[packed.fusion_start :]) == "\nAnswer:"
    text = tokenizer.decode(packed.input_ids)
    assert text == (
        "Answer.\n\nQ: what is the capital of france?\nA: paris\n\nQ: what is the capital of france? | "
        "Q: france's capital is? | Q: name the capital of france\nAnswer:"
    )


def test_weights_change_the_answer_as_repeating_a_wording_does(toy):
    question = QUESTIONS[0]
    thrice = replace(question, wordings=[question.wordings[0], *question.wordings[1:2] * 3])
    twice = replace(question, wordings=question.wordings[:2])
    weighted = answerer(toy).answer([twice], [[1.0, 3.0]])
    assert weighted[0][0].text == answerer(toy).answer([thrice])[0][0].text


def test_the_best_wording_alone_decides_and_is_read(toy):
    [[answer]] = answerer(toy, method="weighted_max").answer(QUESTIONS[:1], [[0.1, 0.8, 0.3]])
    alone = answerer(toy, method="per_prompt").answer(QUESTIONS[:1])[0][1]
    assert (answer.text, answer.num_prompt_tokens) == (alone.text, alone.num_prompt_tokens)


def test_samples_come_with_each_wording_and_do_not_depend_on_the_batch(toy):
    subject = answerer(toy, method="per_prompt", confidence_samples=7)
    together, alone = subject.answer(QUESTIONS), [subject.answer([question])[0] for question in QUESTIONS]
    assert plain(together) == plain(alone)
    samples = [answer.samples for row in together for answer in row]
    assert {len(texts) for texts in samples} == {7}
    assert any(len(set(texts)) > 1 for texts in samples)
    assert plain(together)[0][0][:3] == plain(answerer(toy, method="per_prompt").answer(QUESTIONS))[0][0][:3]


def test_answers_end_at_any_token_with_a_newline_or_at_the_end_token(toy):
    model, tokenizer = toy
    stops = stop_token_ids(model, tokenizer)
    assert 1 in stops
    newlines = {token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])}
    assert len(newlines) > 1, "the tokenizer should have merged a newline with something"
    assert stops == newlines | {1}


def test_the_model_may_name_several_ends(toy):
    model, tokenizer = toy
    model.generation_config.eos_token_id = [1, 7]
    try:
        assert {1, 7} <= stop_token_ids(model, tokenizer)
    finally:
        model.generation_config.eos_token_id = 1


@pytest.mark.parametrize("method", METHODS)
def test_bad_questions_and_weights_are_refused(toy, method):
    subject = answerer(toy, method=method)
    with pytest.raises(ValueError, match="questions is empty"):
        subject.answer([])
    if method not in TAKES_WEIGHTS:
        with pytest.raises(ValueError, match=f"method='{method}' takes no weights"):
            subject.answer(QUESTIONS, WEIGHTS)
        return
    if method in NEEDS_WEIGHTS:
        with pytest.raises(ValueError, match=f"method='{method}' needs weights"):
            subject.answer(QUESTIONS)
    for bad in ([0.5], [0.5, -1.0, 1.0], [0.5, float("nan"), 1.0]):
        with pytest.raises(ValueError, match=r"weights.*valid"):
            subject.answer(QUESTIONS[:1], [bad])


def test_bad_options_are_refused(toy):
    with pytest.raises(ValueError, match="method='mean' is unknown; valid: fusion, avg"):
        replace(OPTIONS, method="mean")
    with pytest.raises(ValueError, match="confidence_samples=3 with method='avg'"):
        replace(OPTIONS, method="avg", confidence_samples=3)
    with pytest.raises(ValueError, match="positions='aligned' with a prefix"):
        answerer(toy, positions="aligned").answer(QUESTIONS)
    long = replace(QUESTIONS[0], wordings=["Q: " + "what " * 600])
    with pytest.raises(ValueError, match="valid: up to 512, the context"):
        answerer(toy).answer([long])


def test_aligned_positions_run_where_the_prefix_is_repeated(toy):
    subject = answerer(toy, positions="aligned", shared_prefix=False)
    packed = subject.packed(QUESTIONS[0])
    assert len({int(packed.position_ids[end - 1]) for _, end in packed.spans}) == 1
    assert torch.equal(packed.position_ids[packed.fusion_start :], torch.arange(3) + packed.next_position - 3)
    assert subject.answer(QUESTIONS)
