"""Texts to lemmas."""

import sys
from types import SimpleNamespace

import pytest

from flextok.fusion.lemmas import SimpleLemmatizer, make_lemmatizer


@pytest.mark.parametrize(
    ("text", "lemmas"),
    [
        ("The Eiffel-Tower!", ["the", "eiffel", "tower"]),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("Cafe\u0301 caf\u00e9", ["café", "café"]),
        ("1,000 m", ["1", "000", "m"]),
        (" .", []),
        ("", []),
    ],
)
def test_simple_lemmas_are_words_without_case(text, lemmas):
    assert SimpleLemmatizer()([text, "x"]) == [lemmas, ["x"]]


def test_spacy_that_is_missing_names_the_extra_and_the_pipeline(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(
        ImportError, match=r"pip install 'flextok\[lemmas\]' && python -m spacy download en_core_web_lg"
    ):
        make_lemmatizer("spacy")


def test_a_pipeline_that_is_missing_is_named(monkeypatch):
    def load(name):
        raise OSError("[E050] Can't find model")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(ValueError, match="python -m spacy download en_core_web_lg"):
        make_lemmatizer("spacy")


def test_spacy_lemmas_are_in_lower_case_without_punctuation(monkeypatch):
    def token(text):
        return SimpleNamespace(lemma_=text, is_punct=text == ".", is_space=text == " ")

    pipeline = SimpleNamespace(
        pipe=lambda texts: [[token(word) for word in ("The", "city", " ", ".")] for _ in texts],
        pipe_names=["lemmatizer"],
    )
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: pipeline))
    lemmatizer = make_lemmatizer("spacy")
    assert lemmatizer(["The cities ."]) == [["the", "city"]]
    assert lemmatizer.name == "spacy/en_core_web_lg"


def test_a_pipeline_without_lemmas_is_refused(monkeypatch):
    spacy = SimpleNamespace(load=lambda name: SimpleNamespace(pipe_names=["ner"]))
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    with pytest.raises(ValueError, match="has no lemmatizer, only"):
        make_lemmatizer("spacy")


def test_an_unknown_lemmatizer_is_an_error():
    with pytest.raises(ValueError, match="lemmatizer='nltk' is unknown; valid: simple, spacy"):
        make_lemmatizer("nltk")
