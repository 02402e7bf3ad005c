"""Texts to lists of lemmas, which answers are compared by."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

LEMMATIZERS = ("simple", "spacy")


class Lemmatizer(Protocol):
    """`name` goes into the files of results, for numbers of different lemmatisers cannot be compared."""

    name: str

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The lemmas of each text."""


class SimpleLemmatizer:
    """Words without regard to case and punctuation; no endings are taken off. Needs nothing else."""

    name = "simple"

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The words of each text, case folded; characters that look the same are the same (NFKC)."""
        return [re.findall(r"\w+", unicodedata.normalize("NFKC", text.casefold())) for text in texts]


class SpacyLemmatizer:
    """Lemmas of a spaCy pipeline in lower case, without punctuation.

    Args:
        pipeline: The name of an installed pipeline.

    Raises:
        ImportError: spaCy is not installed.
        ValueError: The pipeline is not installed, or has no lemmatiser.
    """

    def __init__(self, pipeline: str = "en_core_web_lg") -> None:
        try:
            import spacy
        except ImportError as error:
            raise ImportError(
                "lemmatizer=spacy needs spaCy: pip install 'flextok[lemmas]' && "
                f"python -m spacy download {pipeline}; or take lemmatizer=simple"
            ) from error
        try:
            self.nlp = spacy.load(pipeline)
        except OSError as error:
            raise ValueError(
                f"the spaCy pipeline {pipeline!r} is not installed: python -m spacy download {pipeline}"
            ) from error
        if "lemmatizer" not in self.nlp.pipe_names:  # All its lemmas would be empty, and all answers equal.
            raise ValueError(f"the spaCy pipeline {pipeline!r} has no lemmatizer, only {self.nlp.pipe_names}")
        self.name = f"spacy/{pipeline}"

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The lemmas of each text."""
        documents = self.nlp.pipe(texts)
        return [[t.lemma_.lower() for t in document if not (t.is_punct or t.is_space)] for document in documents]


def make_lemmatizer(name: str) -> Lemmatizer:
    """One of `LEMMATIZERS`.

    Raises:
        ValueError: There is none of this name, or its pipeline is not installed.
        ImportError: Its library is not installed.
    """
    if name not in LEMMATIZERS:
        raise ValueError(f"lemmatizer={name!r} is unknown; valid: {', '.join(LEMMATIZERS)}")
    return SimpleLemmatizer() if name == "simple" else SpacyLemmatizer()


def add_lemmas(rows: Sequence[Mapping[str, Any]], lemmatizer: Lemmatizer) -> list[dict[str, Any]]:
    """Rows of results with `predict_lemma` and `answer_lemmas`, made of `prediction` and `answers`."""
    texts = [text for row in rows for text in (row["prediction"], *row["answers"])]
    lemmas = iter(lemmatizer(texts))
    return [
        {**row, "predict_lemma": next(lemmas), "answer_lemmas": [next(lemmas) for _ in row["answers"]]} for row in rows
    ]
