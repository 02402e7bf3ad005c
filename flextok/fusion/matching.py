"""Whether an answer is right: lists of lemmas against each other, and how sure a model is of its answer."""

from collections.abc import Sequence

MODES = ("exact", "contains", "either")

Lemmas = Sequence[str]


def lemma_match(pred: Lemmas, golds: Sequence[Lemmas], mode: str = "exact") -> bool:
    """Whether the lemmas of a prediction match those of any right answer. Empty lists never match.

    Args:
        pred: The lemmas of the prediction.
        golds: Those of each right answer.
        mode: `exact`, equal lists; `contains`, an answer is a contiguous part of the prediction; `either`, that, or the
            prediction is a contiguous part of an answer.

    Raises:
        ValueError: The mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; valid: {', '.join(MODES)}")
    return any(_match(list(pred), list(gold), mode) for gold in golds if pred and gold)


def confidence(greedy: Lemmas, samples: Sequence[Lemmas]) -> float:
    """The share of sampled answers that match the greedy one in the mode `either`, from 0 to 1.

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError("samples=[]: confidence needs at least one sampled answer")
    return sum(lemma_match(sample, [greedy], "either") for sample in samples) / len(samples)


def _match(pred: list[str], gold: list[str], mode: str) -> bool:
    if mode == "exact":
        return pred == gold
    return _is_part(gold, pred) or (mode == "either" and _is_part(pred, gold))


def _is_part(short: list[str], long: list[str]) -> bool:
    return any(long[start : start + len(short)] == short for start in range(len(long) - len(short) + 1))
