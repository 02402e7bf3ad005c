"""Answering batches of questions with a model, by any of the methods of `flextok.fusion.methods`."""

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flextok.fusion.ensemble import EnsembleMethod, generate_ensemble
from flextok.fusion.generate import FusionOutput, generate_fused
from flextok.fusion.methods import NEEDS_WEIGHTS, TAKES_WEIGHTS, Answer, MethodOptions
from flextok.fusion.packing import PackedPrompt, pack_prompts, pack_segments
from flextok.fusion.prompts import PromptTexts
from flextok.fusion.strategies import Sampling, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_T = TypeVar("_T")
CONFIDENCE_SEED = 100
# Sampled answers that are written at once.
_SAMPLED_ROWS = 512


class Answerer:
    """Answers batches of questions with one model and one method."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", options: MethodOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._stop_ids = stop_token_ids(model, tokenizer)

    def using(self, options: MethodOptions) -> "Answerer":
        """The same model with other options."""
        other = copy(self)
        other.options = options
        return other

    def answer(
        self, questions: Sequence[PromptTexts], weights: Sequence[Sequence[float]] | None = None
    ) -> list[list[Answer]]:
        """Answer all questions at once: one answer each, or one per wording for `per_prompt`.

        Args:
            questions: any numbers of wordings.
            weights: per question one number per wording, for `TAKES_WEIGHTS`; None lets all wordings of `fusion` count
                equally.

        Raises:
            ValueError: no question, weights that are missing or that the method does not take, and whatever
                `generate_fused` and `generate_ensemble` refuse.
        """
        method = self.options.method
        if not questions:
            raise ValueError("questions is empty; valid: one question or more")
        if weights is not None and method not in TAKES_WEIGHTS:
            raise ValueError(f"method={method!r} takes no weights; valid with weights: {', '.join(TAKES_WEIGHTS)}")
        if weights is None and method in NEEDS_WEIGHTS:
            raise ValueError(f"method={method!r} needs weights: for each question one number per wording")
        if method == "fusion":
            packed = [self.packed(question) for question in questions]
            return [[answer] for answer in self._continued(packed, weights=weights)]
        if method == "origin":
            return [[answer] for answer in self._continued([self._prompts(question)[0] for question in questions])]
        if method == "per_prompt":
            return self._each_wording(questions)
        return [[answer] for answer in self._ensemble(questions, weights)]

    def packed(self, question: PromptTexts) -> PackedPrompt:
        """All wordings of a question in one sequence, as `fusion` reads them."""
        options, prompts = self.options, self._prompts(question)
        first = prompts[0].wording_spans[0][0]
        prefix = prompts[0].input_ids[:first].tolist()
        segments, tail = [prompt.input_ids[first:].tolist() for prompt in prompts], []
        if options.shared_tail:
            tail = prompts[0].input_ids[prompts[0].fusion_start :].tolist()
            segments = [segment[: len(segment) - len(tail)] for segment in segments]
        if not options.shared_prefix:
            segments, prefix = [prefix + segment for segment in segments], []
        separator = options.separator
        return pack_segments(
            segments,
            prefix=prefix,
            separator=self.tokenizer(separator, add_special_tokens=False)["input_ids"] if separator else (),
            tail=tail,
            positions=options.positions,
        )

    def generated(
        self, prompts: Sequence[PackedPrompt], weights: Sequence[Sequence[float]] | None = None
    ) -> list[list[int]]:
        """The new tokens after prompts of `packed`, the one that ends the answer included."""
        return self._generate_fused(prompts, self.options.strategy, weights).token_lists()

    def _prompts(self, question: PromptTexts) -> list[PackedPrompt]:
        """The prompt of each wording by itself."""
        return [
            pack_prompts([wording], self.tokenizer, prefix=question.prefix, tail=question.tail)
            for wording in question.wordings
        ]

    def _each_wording(self, questions: Sequence[PromptTexts]) -> list[list[Answer]]:
        prompts = [self._prompts(question) for question in questions]
        flat = [prompt for of_question in prompts for prompt in of_question]
        answers = iter(self._with_samples(self._continued(flat), flat))
        return [[next(answers) for _ in of_question] for of_question in prompts]

    def _with_samples(self, answers: list[Answer], prompts: Sequence[PackedPrompt]) -> list[Answer]:
        count = self.options.confidence_samples
        if count == 0:
            return answers
        texts: list[str] = []
        strategy = Sampling(seed=CONFIDENCE_SEED, samples=count)
        step = max(1, _SAMPLED_ROWS // count)
        for start in range(0, len(prompts), step):
            texts += self._texts(self._generate_fused(prompts[start : start + step], strategy))
        return [
            replace(answer, samples=tuple(texts[number * count : (number + 1) * count]))
            for number, answer in enumerate(answers)
        ]

    def _ensemble(self, questions: Sequence[PromptTexts], weights: Sequence[Sequence[float]] | None) -> list[Answer]:
        """Questions with equally many wordings are run together; answers are in the order of the questions."""
        answers: dict[int, Answer] = {}
        counts = [len(question.wordings) for question in questions]
        for count in sorted(set(counts)):
            places = [place for place, number in enumerate(counts) if number == count]
            prompts = [[prompt.input_ids.tolist() for prompt in self._prompts(questions[place])] for place in places]
            rows = None if weights is None else [weights[place] for place in places]
            answers |= dict(zip(places, self._ensemble_of_equals(prompts, rows), strict=True))
        return [answers[place] for place in range(len(questions))]

    def _ensemble_of_equals(
        self, prompts: Sequence[Sequence[list[int]]], weights: Sequence[Sequence[float]] | None
    ) -> list[Answer]:
        for row in weights or ():
            if len(row) != len(prompts[0]):
                raise ValueError(f"weights={list(row)}; valid: one number for each of {len(prompts[0])} wordings")
        num_read = [sum(map(len, of_question)) for of_question in prompts]
        if weights is not None and self.options.method == "weighted_max":
            # The others are not read.
            num_read = [len(of_q[list(row).index(max(row))]) for of_q, row in zip(prompts, weights, strict=True)]
        return self._timed(
            lambda: generate_ensemble(
                self.model,
                _by_wording(prompts),
                method=cast(EnsembleMethod, self.options.method),
                weights=None if weights is None else _by_wording(weights),
                max_new_tokens=self.options.max_new_tokens,
                eos_token_ids=self._stop_ids,
                backend=self.options.backend,
                strategy=self.options.strategy,
            ),
            num_read,
        )

    def _continued(
        self, prompts: Sequence[PackedPrompt], weights: Sequence[Sequence[float]] | None = None
    ) -> list[Answer]:
        return self._timed(
            lambda: self._generate_fused(prompts, self.options.strategy, weights), [len(prompt) for prompt in prompts]
        )

    def _generate_fused(
        self,
        prompts: Sequence[PackedPrompt],
        strategy: Strategy,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> FusionOutput:
        return generate_fused(
            self.model,
            prompts,
            max_new_tokens=self.options.max_new_tokens,
            eos_token_ids=self._stop_ids,
            gap_keys=self.options.gap_keys,
            backend=self.options.backend,
            weights=weights,
            strategy=strategy,
        )

    def _timed(self, generate: Callable[[], FusionOutput], num_prompt_tokens: Sequence[int]) -> list[Answer]:
        start = time.perf_counter()
        output = generate()
        new_tokens = output.lengths.tolist()  # waits for the device
        seconds = (time.perf_counter() - start) / len(num_prompt_tokens)
        rows = zip(self._texts(output), num_prompt_tokens, new_tokens, strict=True)
        return [Answer(text, num_read, num_new, seconds) for text, num_read, num_new in rows]

    def _texts(self, output: FusionOutput) -> list[str]:
        return self.tokenizer.batch_decode(output.token_lists(), skip_special_tokens=True)


def stop_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids that end an answer: those for its end, of the model and the tokenizer, and all with a newline in them."""
    ends: set[int] = set()
    for given in (tokenizer.eos_token_id, _end_of(model.generation_config), _end_of(model.config)):
        ends.update([given] if isinstance(given, int) else given or ())
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return ends | {token for token, text in enumerate(texts) if "\n" in text}


def _end_of(config: Any) -> int | list[int] | None:
    return getattr(config, "eos_token_id", None)


def _by_wording(rows: Sequence[Sequence[_T]]) -> list[list[_T]]:
    return [list(column) for column in zip(*rows, strict=True)]
