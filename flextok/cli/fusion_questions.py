"""From settings of paraphrase fusion to the questions that are asked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flextok.cli.fusion_settings import FusionSettings

if TYPE_CHECKING:
    from flextok.fusion.items import Item
    from flextok.fusion.prompts import PromptStyle, PromptTexts

_HOW = "python -m flextok fuse fusion.method=per_prompt fusion.confidence_samples=100"


@dataclass(frozen=True)
class Question:
    """An item with the wordings that were chosen, and what is needed to ask it."""

    item: "Item"
    texts: "PromptTexts"
    variants: list[int]
    """The number of each wording among all of the item."""


@dataclass(frozen=True)
class Questions:
    """The questions in their order, and how answers to them are read."""

    questions: list[Question]
    style: "PromptStyle"

    def __len__(self) -> int:
        return len(self.questions)


def read_questions(settings: FusionSettings) -> Questions:
    """Build the data source, choose wordings, word the prompts.

    Raises:
        ValueError: for what the data source, `select_wordings` or the file of weights refuses, and for positions that
            do not fit the prompts.
    """
    from hydra.errors import HydraException
    from hydra.utils import instantiate

    from flextok.config import describe_error
    from flextok.fusion.items import select_wordings

    try:
        source = instantiate(settings.data, _convert_="all")
    except HydraException as error:
        raise ValueError(describe_error(error)) from error
    items = source.test_items()[: settings.limit]
    examples = source.example_items()
    chosen = select_wordings(items, num_paraphrases=settings.num_paraphrases, indices=settings.indices)
    questions = []
    for item in chosen:
        variants = settings.indices or [*range(len(item.paraphrases))]
        texts = source.prompts.texts(item.paraphrases, examples)
        if settings.tail:
            texts = replace(texts, tail=settings.tail)
        if settings.positions == "aligned" and settings.shared_prefix and texts.prefix:
            raise ValueError(
                "fusion.positions='aligned' cannot be used with a prefix that all wordings share; valid: "
                "fusion.shared_prefix=false, or fusion.positions=restart or running"
            )
        questions.append(Question(item, texts, variants))
    return Questions(questions, source.prompts)


def read_weights(settings: FusionSettings, questions: Questions) -> dict[str, list[float]] | None:
    """What fusion.weights says, by uuid: a number for each wording.

    ValueError for a file that does not have the confidence of each of these wordings.
    """
    if settings.weights is None:
        return None
    if settings.weights == "uniform":
        return {question.item.uuid: [1.0] * len(question.variants) for question in questions.questions}
    path = settings.weights
    rows = _confidence_rows(path)
    return {
        question.item.uuid: [
            _confidence(rows, path, question.item.uuid, *wording)
            for wording in zip(question.variants, question.item.paraphrases, strict=True)
        ]
        for question in questions.questions
    }


def _confidence_rows(path: str) -> dict[tuple[str, int | None], Mapping[str, Any]]:
    from flextok.fusion.results import read_results

    rows = read_results(path)
    if any(row.get("confidence") is None or row.get("variant") is None for row in rows):
        raise ValueError(f"fusion.weights={path}: has no confidence of each wording; valid: what this writes: {_HOW}")
    return {(row["uuid"], row["variant"]): row for row in rows}


def _confidence(
    rows: Mapping[tuple[str, int | None], Mapping[str, Any]], path: str, uuid: str, variant: int, wording: str
) -> float:
    row = rows.get((uuid, variant))
    if row is None:
        raise ValueError(
            f"fusion.weights={path}: has no confidence of wording {variant} of question {uuid!r}; write it with the "
            f"same questions and wordings: {_HOW}"
        )
    if row.get("paraphrase") not in (None, wording):
        raise ValueError(
            f"fusion.weights={path}: wording {variant} of question {uuid!r} is {row['paraphrase']!r} there and "
            f"{wording!r} here; valid: a file of the same questions"
        )
    return float(row["confidence"])
