"""Ensembles give the recorded scores and tokens; their scores combine as they say."""

import pytest
import torch

from flextok.fusion import Beams, Sampling, combine_logits, generate_ensemble
from tests.fusion.recorded import cases_of, random_ids, recorded_model, tensors_of
from tests.support import max_difference


@pytest.fixture(scope="module")
def model():
    return recorded_model()


def weights_of(case):
    return case["weights"] and [[weight] for weight in case["weights"]]


@pytest.mark.parametrize("case", cases_of("ensemble"), ids=lambda case: case["name"])
def test_recorded_scores_and_tokens(model, case):
    recorded = {name: tensors_of("ensemble")[f"{case['name']}.{name}"] for name in ("scores", "tokens", "eos_tokens")}
    prompt_sets = [[prompt] for prompt in case["prompts"]]
    options = {"method": case["method"], "weights": weights_of(case), "max_new_tokens": case["max_new_tokens"]}
    out = generate_ensemble(model, prompt_sets, return_logits=True, **options)
    assert torch.equal(out.sequences[0], recorded["tokens"])
    assert max_difference(out.step_logits[0], recorded["scores"]) < 1e-4
    stopped = generate_ensemble(model, prompt_sets, eos_token_ids=[case["eos"]], **options)
    assert torch.equal(stopped.sequences[0], recorded["eos_tokens"])


@pytest.mark.parametrize("case", cases_of("ensemble"), ids=lambda case: case["name"])
def test_recorded_combinations(case):
    stacked, scores = (tensors_of("ensemble")[f"{case['name']}.{name}"] for name in ("stacked_logits", "scores"))
    weights = None if case["weights"] is None else torch.tensor(weights_of(case))
    assert max_difference(combine_logits(stacked[:, None], case["method"], weights)[0], scores[0]) < 1e-5


METHODS = {"avg": None, "max": None, "weighted_avg": [0.5, 2.0, 1.0], "weighted_max": [0.5, 2.0, 1.0]}


@pytest.mark.parametrize("strategy", [None, Sampling(seed=1, samples=2), Beams(3)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_questions_one_by_one(model, method, strategy):
    questions = [random_ids(5, 9, 7, seed=seed) for seed in range(3)]
    weights = METHODS[method] and [[weight] * 3 for weight in METHODS[method]]
    options = {"method": method, "max_new_tokens": 5, "eos_token_ids": [30, 70], "strategy": strategy}
    prompt_sets = [list(prompts) for prompts in zip(*questions, strict=True)]
    together = generate_ensemble(model, prompt_sets, weights=weights, **options).token_lists()
    alone = []
    for question in questions:
        one = weights and [row[:1] for row in weights]
        alone += generate_ensemble(model, [[p] for p in question], weights=one, **options).token_lists()
    assert together == alone


def test_one_wording_is_the_model_alone(model):
    (prompt,) = random_ids(8)
    out = generate_ensemble(model, [[prompt]], method="avg", max_new_tokens=6)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(out.sequences[0], expected[0, len(prompt) :])


def test_what_each_method_makes_of_two_wordings():
    logits = torch.tensor([[[4.0, 3.0, 0.0]], [[0.0, 3.0, 9.0]]])
    weights = torch.tensor([[3.0], [1.0]])
    assert combine_logits(logits, "avg").tolist() == [[2.0, 3.0, 4.5]]
    assert torch.equal(combine_logits(logits, "max"), logits.softmax(-1).amax(0))
    assert combine_logits(logits, "weighted_avg", weights).tolist() == [[3.0, 3.0, 2.25]]
    assert combine_logits(logits, "weighted_max", weights).tolist() == [[4.0, 3.0, 0.0]]
    assert combine_logits(logits, "weighted_max", torch.ones(2, 1)).tolist() == [[4.0, 3.0, 0.0]]
    assert combine_logits(logits, "weighted_avg", torch.zeros(2, 1)).tolist() == [[2.0, 3.0, 4.5]]


LOGITS = torch.zeros(2, 1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LOGITS, "median"), "method='median' is unknown; valid: avg, max, weighted_avg, weighted_max"),
        ((LOGITS, "weighted_avg"), "'weighted_avg' needs weights"),
        ((LOGITS, "weighted_max", torch.ones(2, 2)), r"weights have shape \[2, 2\]; valid: \[2, 1\]"),
        ((LOGITS, "weighted_avg", torch.tensor([[1.0], [-1.0]])), "finite numbers >= 0"),
        ((LOGITS, "weighted_max", torch.tensor([[1.0], [torch.nan]])), "finite numbers >= 0"),
        ((LOGITS, "avg", torch.ones(2, 1)), "'avg' takes no weights"),
        ((LOGITS[0], "avg"), r"logits have shape \[1, 5\]; valid: \[wordings, batch, vocabulary\]"),
    ],
)
def test_combinations_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        combine_logits(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_sets": []}, "prompt_sets is empty"),
        ({"prompt_sets": [[]]}, "prompt_sets is empty"),
        ({"prompt_sets": [[[3]], [[4], [5]]]}, r"prompt_sets have \[1, 2\] questions"),
        ({"prompt_sets": [[[3]], [[]]]}, "has no tokens"),
        ({"method": "vote"}, "method='vote' is unknown"),
        ({"method": "weighted_avg"}, "needs weights"),
        ({"method": "weighted_max", "weights": [[1.0]]}, r"weights have shape \[1, 1\]; valid: \[2, 1\]"),
        ({"weights": [[1.0], [1.0]]}, "takes no weights"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 600}, "valid: up to 512"),
    ],
)
def test_bad_input(model, changes, message):
    arguments = {"prompt_sets": [[[3, 4]], [[5]]], "method": "avg", "max_new_tokens": 2, **changes}
    with pytest.raises(ValueError, match=message):
        generate_ensemble(model, **arguments)
