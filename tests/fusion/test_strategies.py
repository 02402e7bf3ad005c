"""Choosing tokens: greedy ties, the distribution of samples, and beams against every possible text."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flextok.fusion.decoding import Rows, Stopping
from flextok.fusion.strategies import Beams, Greedy, Sampling


class Table(Rows):
    """Scores of the next token that depend on all tokens so far, drawn at random but the same for the same text."""

    def __init__(self, num_rows, vocabulary, seed=0, scale=2.0):
        self.texts, self.vocabulary, self.seed, self.scale = (
            [(row,) for row in range(num_rows)],
            vocabulary,
            seed,
            scale,
        )

    def scores_of(self, text):
        generator = torch.Generator().manual_seed(hash((self.seed, *text)) % 2**31)
        return self.scale * torch.randn(self.vocabulary, generator=generator, dtype=torch.float64)

    def start(self):
        return torch.stack([self.scores_of(text) for text in self.texts])

    def step(self, tokens):
        self.texts = [(*text, token) for text, token in zip(self.texts, tokens.tolist(), strict=True)]
        return self.start()

    def select(self, index):
        self.texts = [self.texts[row] for row in index.tolist()]


def run(strategy, rows, stopping, prompts=None):
    return strategy.run(rows, rows.start(), prompts or [[row] for row in range(len(rows.texts))], stopping)


def test_of_equal_scores_the_first_is_chosen():
    class Level(Table):
        def scores_of(self, text):
            return torch.tensor([0.0, 2.0, 1.0, 2.0])

    assert run(Greedy(), Level(2, 4), Stopping(3)).sequences.tolist() == [[1, 1, 1]] * 2


# --- beams ------------------------------------------------------------------------------------------------------------


def best_text(rows, row, stopping, penalty):
    """The best of all texts, by looking at every one of them."""
    best = (float("-inf"), [])
    for length in range(1, stopping.max_new_tokens + 1):
        for text in product(range(rows.vocabulary), repeat=length):
            ends = [token in stopping.eos_token_ids for token in text]
            if any(ends[:-1]) or not (ends[-1] or length == stopping.max_new_tokens):
                continue
            total = sum(float(rows.scores_of((row, *text[:i])).log_softmax(-1)[token]) for i, token in enumerate(text))
            best = max(best, (total / length**penalty, list(text)))
    return best[1]


@given(seed=st.integers(0, 50), penalty=st.sampled_from([0.0, 1.0, 2.0]), eos=st.sets(st.integers(0, 3), max_size=2))
def test_enough_beams_find_the_best_text(seed, penalty, eos):
    stopping = Stopping(3, eos, pad_token_id=9)
    rows = Table(2, 4, seed)
    decoded = run(Beams(64, penalty), rows, stopping)
    for row, (tokens, length) in enumerate(zip(decoded.sequences.tolist(), decoded.lengths.tolist(), strict=True)):
        assert tokens[:length] == best_text(Table(2, 4, seed), row, stopping, penalty)
        assert set(tokens[length:]) <= {9}


@given(seed=st.integers(0, 50), eos=st.sets(st.integers(0, 5), max_size=3))
def test_one_beam_is_greedy(seed, eos):
    stopping = Stopping(6, eos)
    beam, greedy = (run(strategy, Table(3, 6, seed), stopping) for strategy in (Beams(1), Greedy()))
    assert torch.equal(beam.sequences, greedy.sequences)
    assert torch.equal(beam.lengths, greedy.lengths)


# --- sampling ---------------------------------------------------------------------------------------------------------


def shares(strategy, samples=4000):
    """How often each of five tokens is drawn, and the logits it is drawn from."""
    rows = Table(1, 5, seed=7)
    logits = rows.start()[0]
    decoded = run(strategy, rows, Stopping(1))
    return torch.bincount(decoded.sequences[:, 0], minlength=5) / samples, logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_follow_the_probabilities(temperature):
    drawn, logits = shares(Sampling(temperature=temperature, samples=4000))
    # Six standard errors of a share of one half.
    assert float((drawn - (logits / temperature).softmax(-1)).abs().max()) < 6 * 0.5 / 4000**0.5


def test_only_the_best_tokens_are_drawn():
    _, logits = shares(Sampling())
    order, probs = logits.argsort(descending=True), logits.softmax(-1)
    drawn, _ = shares(Sampling(top_k=2, samples=4000))
    assert set(drawn.nonzero()[:, 0].tolist()) == set(order[:2].tolist())
    expected = probs[order[0]] / probs[order[:2]].sum()
    assert float((drawn[order[0]] - expected).abs()) < 6 * 0.5 / 4000**0.5
    # Just above the share of the best one: the second is needed to reach it.
    drawn, _ = shares(Sampling(top_p=float(probs[order[0]]) + 1e-6, samples=4000))
    assert set(drawn.nonzero()[:, 0].tolist()) == set(order[:2].tolist())
    drawn, _ = shares(Sampling(top_p=float(probs[order[0]]) - 1e-6, samples=4000))
    assert drawn[order[0]] == 1.0


def test_draws_depend_on_the_prompt_and_the_seed_alone():
    def draw(seed, prompts):
        return run(Sampling(seed=seed), Table(len(prompts), 50, scale=0.0), Stopping(8), prompts).sequences

    together = draw(0, [[3, 4], [5], [3, 4]])
    assert torch.equal(together[1], draw(0, [[5]])[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], draw(1, [[3, 4]])[0])


def test_samples_of_a_prompt_differ_and_are_neighbours():
    out = run(Sampling(samples=3), Table(2, 50, scale=0.0), Stopping(8), [[3], [4]]).sequences
    assert len({tuple(row) for row in out.tolist()}) == 6
    assert torch.equal(out[3:], run(Sampling(samples=3), Table(1, 50, scale=0.0), Stopping(8), [[4]]).sequences)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=0.0), "temperature=0.0; valid: a number > 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature=nan"),
        (lambda: Sampling(top_k=0), "top_k=0; valid: 1 token or more"),
        (lambda: Sampling(top_p=0.0), "top_p=0.0; valid: above 0"),
        (lambda: Sampling(top_p=1.5), "top_p=1.5"),
        (lambda: Sampling(samples=0), "samples=0"),
        (lambda: Beams(0), "beams=0; valid: 1 or more"),
        (lambda: Stopping(0), "max_new_tokens=0"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
