"""Files of answers as numbers: accuracy with confidence intervals, differences, agreement, tokens and seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flextok.evaluation.bootstrap import paired_bootstrap
from flextok.fusion.lemmas import add_lemmas, make_lemmatizer
from flextok.fusion.matching import lemma_match
from flextok.fusion.results import read_results, read_run_config

MODES = ("exact", "contains")
COSTS = ("prompt_tokens", "new_tokens", "seconds")
SEED = 0

Rows = Sequence[Mapping[str, Any]]


class Interval(NamedTuple):
    """A mean over questions, and where it lies with a confidence of 95 %; no limits for a single question."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")


@dataclass(frozen=True)
class AnswerFile:
    """The rows of one file by question, one or, of `per_prompt`, several for each."""

    name: str
    by_uuid: dict[str, list[Mapping[str, Any]]]
    run_config: dict[str, Any]

    def scores(self, uuids: Sequence[str]) -> NDArray[np.float64]:
        """`[questions, modes]`: whether an answer is right, or the share of the wordings whose answers are."""
        return np.array([[_share_right(self.by_uuid[uuid], mode) for mode in MODES] for uuid in uuids])

    def costs(self) -> dict[str, float | None]:
        """Tokens and seconds per question; None where the file does not say."""
        measured = self.run_config.get("measured") or {}
        count = measured.get("questions")
        return {name: measured[name] / count if count else None for name in COSTS}


def answer_file(name: str, rows: Rows, run_config: Mapping[str, Any] | None) -> AnswerFile:
    """Rows as `read_results` gives them; those without lemmas get simple ones.

    ValueError for a file without rows.
    """
    if not rows:
        raise ValueError(f"{name}: holds no answers")
    config = dict(run_config or {})
    if any(row.get("predict_lemma") is None or row.get("answer_lemmas") is None for row in rows):
        lemmatizer = make_lemmatizer("simple")
        rows, config["lemmatizer"] = add_lemmas(rows, lemmatizer), lemmatizer.name
    by_uuid: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_uuid.setdefault(row["uuid"], []).append(row)
    return AnswerFile(name, by_uuid, config)


def read_answer_file(path: Path, *, name: str) -> AnswerFile:
    """One file of answers; errors as of `read_results`."""
    return answer_file(name, read_results(path), read_run_config(path))


def accuracies(files: Sequence[AnswerFile], uuids: Sequence[str]) -> list[dict[str, Interval]]:
    """The accuracy of each file in each mode, over these questions."""
    return _by_mode(intervals(np.concatenate([file.scores(uuids) for file in files], axis=1)))


def differences(files: Sequence[AnswerFile], reference: AnswerFile, uuids: Sequence[str]) -> list[dict[str, Interval]]:
    """The same minus the accuracy of `reference`, question by question."""
    base = reference.scores(uuids)
    return _by_mode(intervals(np.concatenate([file.scores(uuids) - base for file in files], axis=1)))


def agreement(left: AnswerFile, right: AnswerFile, uuids: Sequence[str]) -> float:
    """The share of questions to which both give the same lemmas, wording with wording where there are several."""
    shares = [
        np.mean([a["predict_lemma"] == b["predict_lemma"] for a, b in product(left.by_uuid[uuid], right.by_uuid[uuid])])
        for uuid in uuids
    ]
    return float(np.mean(shares))


def intervals(values: NDArray[np.float64]) -> list[Interval]:
    """The mean of each column of `[questions, columns]`."""
    means = values.mean(0).tolist()
    if len(values) < 2:
        return [Interval(mean, None, None) for mean in means]
    lows, highs = paired_bootstrap(values, seed=SEED)
    return [Interval(*limits) for limits in zip(means, lows.tolist(), highs.tolist(), strict=True)]


def summary_line(file: AnswerFile) -> str:
    """What one run came to, on one line."""
    [scores] = accuracies([file], [*file.by_uuid])
    parts = [f"{len(file.by_uuid)} questions", *(f"{mode} {interval}" for mode, interval in scores.items())]
    costs = file.costs()
    if costs["seconds"] is not None:
        parts.append(
            f"{costs['prompt_tokens']:.1f} prompt tokens, {costs['new_tokens']:.1f} new ones and "
            f"{costs['seconds']:.4f} s per question"
        )
    return ", ".join(parts)


def _by_mode(columns: Sequence[Interval]) -> list[dict[str, Interval]]:
    step = len(MODES)
    return [dict(zip(MODES, columns[start : start + step], strict=True)) for start in range(0, len(columns), step)]


def _share_right(rows: Rows, mode: str) -> float:
    return float(np.mean([lemma_match(row["predict_lemma"], row["answer_lemmas"], mode) for row in rows]))
