"""How the next token is chosen: the most probable one, at random, or by searching with several rows at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextok.fusion.beams import beam_search
from flextok.fusion.decoding import Decoded, Rows, Stopping, Streamer, decode
from flextok.seeding import mixed_seed


class Strategy(ABC):
    """A way to continue rows of text."""

    @abstractmethod
    def run(
        self,
        rows: Rows,
        scores: Tensor,
        prompts: Sequence[Sequence[int]],
        stopping: Stopping,
        *,
        keep_scores: bool = False,
        streamer: Streamer | None = None,
    ) -> Decoded:
        """Continue `rows`, whose first scores are `scores` `[rows, vocabulary]`; `prompts` are their tokens.

        ValueError for what the strategy cannot do.
        """


@dataclass(frozen=True)
class Greedy(Strategy):
    """The token of the highest score, of equals the first."""

    def run(
        self,
        rows: Rows,
        scores: Tensor,
        prompts: Sequence[Sequence[int]],
        stopping: Stopping,
        *,
        keep_scores: bool = False,
        streamer: Streamer | None = None,
    ) -> Decoded:
        return decode(rows, scores, _first_of_the_best, stopping, keep_scores=keep_scores, streamer=streamer)


@dataclass(frozen=True)
class Sampling(Strategy):
    """A token at random, by its probability.

    What is drawn for a prompt depends on its tokens and on `seed`, not on what else is in the batch.
    """

    temperature: float = 1.0
    top_k: int | None = None
    """Only so many of the most probable tokens; None for all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability, at least one."""
    seed: int = 0
    samples: int = 1
    """Texts per prompt; those of a prompt are neighbours in the output."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}; valid: a number > 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}; valid: 1 token or more, or None for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; valid: above 0 and at most 1")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}; valid: 1 text or more")

    def run(
        self,
        rows: Rows,
        scores: Tensor,
        prompts: Sequence[Sequence[int]],
        stopping: Stopping,
        *,
        keep_scores: bool = False,
        streamer: Streamer | None = None,
    ) -> Decoded:
        if self.samples > 1:
            index = torch.arange(len(scores), device=scores.device).repeat_interleave(self.samples)
            rows.select(index)
            scores = scores[index]
        generators = [
            torch.Generator().manual_seed(mixed_seed(self.seed, "sample", number, *prompt))
            for prompt in prompts
            for number in range(self.samples)
        ]

        def choose(scores: Tensor) -> Tensor:
            draws = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
            return self._token_at(rows.log_probs(scores), draws.to(scores.device))

        return decode(rows, scores, choose, stopping, keep_scores=keep_scores, streamer=streamer)

    def _token_at(self, log_probs: Tensor, draws: Tensor) -> Tensor:
        """int64 `[rows]`: where `draws`, in [0, 1), fall among the tokens in the order of their probabilities."""
        best, tokens = (log_probs / self.temperature).double().softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = best.cumsum(-1) - best
        is_kept = before < self.top_p
        if self.top_k is not None:
            is_kept[:, self.top_k :] = False
        reached = torch.where(is_kept, best, 0.0).cumsum(-1)
        place = (reached <= draws[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
        # Rounding must not lead past the last token that is kept.
        return tokens.gather(-1, place.minimum(is_kept.sum(-1, keepdim=True) - 1))[:, 0]


@dataclass(frozen=True)
class Beams(Strategy):
    """The most probable text that is found with `beams` of them at a time.

    A text counts as its log-probability over its length to the power of `length_penalty`.
    """

    beams: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams={self.beams}; valid: 1 or more")

    def run(
        self,
        rows: Rows,
        scores: Tensor,
        prompts: Sequence[Sequence[int]],
        stopping: Stopping,
        *,
        keep_scores: bool = False,
        streamer: Streamer | None = None,
    ) -> Decoded:
        if keep_scores or streamer is not None:
            raise ValueError("a beam search decides at its end: it has no scores of single steps and nothing to stream")
        return beam_search(rows, scores, stopping, beams=self.beams, length_penalty=self.length_penalty)


def _first_of_the_best(scores: Tensor) -> Tensor:
    # argmax alone promises no order among equals.
    best = scores.amax(-1, keepdim=True)
    return (scores == best).int().argmax(-1)
