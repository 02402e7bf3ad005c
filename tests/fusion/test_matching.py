"""When an answer counts as right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextok.fusion.matching import MODES, confidence, lemma_match

LEMMAS = st.lists(st.sampled_from("abc"), max_size=5)


@pytest.mark.parametrize(
    ("pred", "golds", "matching"),
    [
        (["a", "b"], [["a", "b"]], {"exact", "contains", "either"}),
        (["x", "a", "b", "y"], [["a", "b"]], {"contains", "either"}),
        (["a"], [["a", "b"]], {"either"}),
        (["a", "x", "b"], [["a", "b"]], set()),
        (["b", "a"], [["a", "b"]], set()),
        (["c"], [["a"], ["c"]], {"exact", "contains", "either"}),
        ([], [["a"]], set()),
        (["a"], [[]], set()),
        ([], [[]], set()),
        (["a"], [], set()),
    ],
)
def test_what_matches_in_which_mode(pred, golds, matching):
    assert {mode for mode in MODES if lemma_match(pred, golds, mode)} == matching


def test_exact_is_the_default():
    assert not lemma_match(["x", "a"], [["a"]])


def test_an_unknown_mode_is_an_error_even_if_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="mode='part' is unknown; valid: exact, contains, either"):
        lemma_match([], [], "part")


@given(LEMMAS, st.lists(LEMMAS, max_size=3))
def test_each_mode_allows_what_the_one_before_allows(pred, golds):
    exact, contains, either = (lemma_match(pred, golds, mode) for mode in MODES)
    assert exact <= contains <= either


@given(LEMMAS, LEMMAS)
def test_either_has_no_sides(one, other):
    assert lemma_match(one, [other], "either") == lemma_match(other, [one], "either")


@given(LEMMAS, LEMMAS, LEMMAS)
def test_what_is_put_around_an_answer_does_not_hide_it(before, gold, after):
    assert lemma_match([*before, *gold, *after], [gold], "contains") == bool(gold)


@given(LEMMAS, LEMMAS)
def test_contains_is_what_it_is_for_texts_of_one_letter_lemmas(pred, gold):
    assert lemma_match(pred, [gold], "contains") == (bool(gold) and "".join(gold) in "".join(pred))


def test_confidence_is_the_share_of_samples_that_agree():
    assert confidence(["a", "b"], [["a"], ["a", "b", "c"], ["c"], []]) == 0.5
    assert confidence([], [["a"], []]) == 0.0


def test_confidence_without_samples_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        confidence(["a"], [])
