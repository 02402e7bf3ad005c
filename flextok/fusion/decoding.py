"""Continuing rows of text token by token, whatever computes the scores of the next token.

How tokens are chosen is in `flextok.fusion.strategies`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rows(ABC):
    """Texts being continued, one per row, and where the scores of their next tokens come from."""

    @abstractmethod
    def start(self) -> Tensor:
        """Read the prompts; scores `[rows, vocabulary]` of the first new token."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens`, int64 `[rows]`; scores of the next ones."""

    @abstractmethod
    def select(self, index: Tensor) -> None:
        """Row i goes on with what row `index[i]` was; there may be more rows than before, or fewer."""

    def log_probs(self, scores: Tensor) -> Tensor:
        """float32 log-probabilities of scores, which are logits unless a subclass says otherwise."""
        return scores.float().log_softmax(-1)


class Streamer(Protocol):
    """What receives tokens as they come: transformers' `TextStreamer` and `TextIteratorStreamer` are such."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Stopping:
    """When a row ends: at one of `eos_token_ids`, or after `max_new_tokens`. It is filled up with `pad_token_id`."""

    max_new_tokens: int
    eos_token_ids: Collection[int] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}; valid: 1 or more")

    def stops(self, tokens: Tensor) -> Tensor:
        """bool: which of `tokens` end their row."""
        return torch.isin(tokens, torch.tensor(sorted(self.eos_token_ids), dtype=tokens.dtype, device=tokens.device))


@dataclass(frozen=True)
class Decoded:
    """New tokens of each row."""

    sequences: Tensor
    """int64 `[rows, steps]`, padded after the token that ended the row."""
    lengths: Tensor
    """int64 `[rows]`, the token that ended the row included."""
    step_scores: Tensor | None = None
    """`[rows, steps, vocabulary]`; what each token was chosen from."""


def decode(
    rows: Rows,
    scores: Tensor,
    choose: Callable[[Tensor], Tensor],
    stopping: Stopping,
    *,
    keep_scores: bool = False,
    streamer: Streamer | None = None,
) -> Decoded:
    """Choose tokens until every row has ended. Rows end one by one: none ends another.

    Args:
        scores: of the first new tokens, `[rows, vocabulary]`.
        choose: the next tokens, int64 `[rows]`, from scores.
    """
    ended = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    lengths = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    tokens_of_steps, scores_of_steps = [], []
    for step in range(stopping.max_new_tokens):
        tokens = choose(scores).masked_fill(ended, stopping.pad_token_id)
        tokens_of_steps.append(tokens)
        if keep_scores:
            scores_of_steps.append(scores)
        if streamer is not None:
            streamer.put(tokens.cpu())
        lengths += ~ended
        ended |= stopping.stops(tokens)
        if step + 1 == stopping.max_new_tokens or bool(ended.all()):
            break
        scores = rows.step(tokens)
    if streamer is not None:
        streamer.end()
    step_scores = torch.stack(scores_of_steps, dim=1) if keep_scores else None
    return Decoded(torch.stack(tokens_of_steps, dim=1), lengths, step_scores)
