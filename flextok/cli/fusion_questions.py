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
    weights: list[float] | None


@dataclass(frozen=True)
class Questions:
    """The questions in their order, and how answers to them are read."""

    questions: list[Question]
    style: "PromptStyle"

    def __len__(self) -> int:
        return len(self.questions)


def read_questions(settings: FusionSettings) -> Questions:
    """Build the data source, choose wordings, word the prompts, read weights.

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
    count = None if settings.indices is not None else settings.num_paraphrases
    chosen = select_wordings(items, num_paraphrases=count, indices=settings.indices)
    rows = None if settings.weights in (None, "uniform") else _confidence_rows(str(settings.weights))
    questions = []
    for item in chosen:
        variants = settings.indices or [*range(len(item.paraphrases))]
        weights = [1.0] * len(variants) if settings.weights == "uniform" else None
        if rows is not None:
            weights = [
                _confidence(rows, str(settings.weights), item.uuid, *wording)
                for wording in zip(variants, item.paraphrases, strict=True)
            ]
        texts = source.prompts.texts(item.paraphrases, examples)
        if settings.tail:
            texts = replace(texts, tail=settings.tail)
        if settings.positions == "aligned" and settings.shared_prefix and texts.prefix:
            raise ValueError(
                "fusion.positions='aligned' cannot be used with a prefix that all wordings share; valid: "
                "fusion.shared_prefix=false, or fusion.positions=restart or running"
            )
        questions.append(Question(item, texts, variants, weights))
    return Questions(questions, source.prompts)


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
