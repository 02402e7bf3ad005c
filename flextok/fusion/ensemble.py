"""Wordings of a question run apart, their scores combined at every token: what fusion is compared with."""

from collections.abc import Collection, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flextok.fusion.attention import FusionBackend, fusion_attention
from flextok.fusion.decoding import Rows, Stopping, Streamer
from flextok.fusion.generate import FusedRows, FusionOutput
from flextok.fusion.packing import pack_segments
from flextok.fusion.strategies import Greedy, Strategy

EnsembleMethod = Literal["avg", "max", "weighted_avg", "weighted_max"]
_WEIGHTED = ("weighted_avg", "weighted_max")


def combine_logits(logits: Tensor, method: EnsembleMethod, weights: Tensor | None = None) -> Tensor:
    """Scores `[batch, vocabulary]` out of the logits of each wording, `[wordings, batch, vocabulary]`.

    `avg` is the mean of the logits; `max` the largest probability that any wording gives; `weighted_avg` the mean
    under `weights` `[wordings, batch]`, which need not add up to one and count equally where all are zero;
    `weighted_max` the logits of the wording of the largest weight, of equals the first.

    Raises:
        ValueError: an unknown method, and weights that are missing, not asked for, of another shape, negative or not
            finite.
    """
    _check_method(method)
    if logits.ndim != 3 or len(logits) == 0:
        raise ValueError(f"logits have shape {list(logits.shape)}; valid: [wordings, batch, vocabulary]")
    if method == "avg":
        _check_no_weights(method, weights)
        return logits.mean(0)
    if method == "max":
        _check_no_weights(method, weights)
        return logits.softmax(-1).amax(0)
    weights = _checked(method, weights, logits.shape[:2]).to(logits)
    if method == "weighted_max":
        return logits[_first_largest(weights), torch.arange(logits.shape[1], device=logits.device)]
    weights = torch.where((weights == 0).all(0), 1.0, weights)
    return ((weights / weights.sum(0))[..., None] * logits).sum(0)


@torch.no_grad()
def generate_ensemble(
    model: PreTrainedModel,
    prompt_sets: Sequence[Sequence[Sequence[int]]],
    *,
    method: EnsembleMethod,
    weights: Sequence[Sequence[float]] | Tensor | None = None,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    pad_token_id: int = 0,
    return_logits: bool = False,
    backend: FusionBackend | None = None,
    strategy: Strategy | None = None,
    streamer: Streamer | None = None,
) -> FusionOutput:
    """Continue the wordings of each question by one text that all of them share.

    Args:
        prompt_sets: `prompt_sets[k][b]` are the token ids of wording k of question b.
        weights: `[wordings, questions]`, for the weighted methods only.
        return_logits: also return the combined scores of every step, as `step_logits`.

    Raises:
        ValueError: no wording or question, different numbers of questions, weights as in `combine_logits`, and
            whatever `generate_fused` refuses.
    """
    _check_method(method)
    if not prompt_sets or not prompt_sets[0]:
        raise ValueError("prompt_sets is empty; valid: one wording or more of one question or more")
    if len({len(prompts) for prompts in prompt_sets}) > 1:
        sizes = [len(prompts) for prompts in prompt_sets]
        raise ValueError(f"prompt_sets have {sizes} questions; valid: every wording of every question")
    stopping = Stopping(max_new_tokens, eos_token_ids, pad_token_id)
    if method in _WEIGHTED:
        given = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        table = _checked(method, given, (len(prompt_sets), len(prompt_sets[0])))
        if method == "weighted_max":
            # The others have no say, so they are not run.
            chosen = _first_largest(table).tolist()
            prompt_sets, table = [[prompt_sets[k][b] for b, k in enumerate(chosen)]], table.amax(0, keepdim=True)
    else:
        _check_no_weights(method, weights)
        table = None
    packed = [pack_segments([prompt]) for prompts in prompt_sets for prompt in prompts]
    ids = [[token for prompts in prompt_sets for token in prompts[b]] for b in range(len(prompt_sets[0]))]
    rows = _EnsembleRows(FusedRows(model, packed, stopping, backend=backend), method, len(prompt_sets), table)
    with fusion_attention(model):
        decoded = (strategy or Greedy()).run(
            rows, rows.start(), ids, stopping, keep_scores=return_logits, streamer=streamer
        )
    return FusionOutput(decoded.sequences, decoded.lengths, step_logits=decoded.step_scores)


class _EnsembleRows(Rows):
    """Questions, each of which is a row per wording of the rows of a model: all first wordings, all second ones, ..."""

    def __init__(self, rows: FusedRows, method: EnsembleMethod, num_wordings: int, weights: Tensor | None) -> None:
        self._rows, self._method, self._num_wordings, self._weights = rows, method, num_wordings, weights
        self._num_questions = 0

    def start(self) -> Tensor:
        return self._combined(self._rows.start())

    def step(self, tokens: Tensor) -> Tensor:
        return self._combined(self._rows.step(tokens.repeat(self._num_wordings)))

    def select(self, index: Tensor) -> None:
        first = torch.arange(self._num_wordings, device=index.device)[:, None] * self._num_questions
        self._rows.select((first + index).flatten())
        self._num_questions = len(index)
        if self._weights is not None:
            self._weights = self._weights[:, index.to(self._weights.device)]

    def log_probs(self, scores: Tensor) -> Tensor:
        if self._method != "max":
            return super().log_probs(scores)
        return (scores.float() / scores.float().sum(-1, keepdim=True)).log()

    def _combined(self, logits: Tensor) -> Tensor:
        self._num_questions = len(logits) // self._num_wordings
        return combine_logits(logits.unflatten(0, (self._num_wordings, -1)), self._method, self._weights)


def _first_largest(weights: Tensor) -> Tensor:
    """int64 `[batch]`: the wording of the largest weight; not argmax alone, which promises no order among equals."""
    return (weights == weights.amax(0)).int().argmax(0)


def _check_method(method: str) -> None:
    if method not in get_args(EnsembleMethod):
        raise ValueError(f"method={method!r} is unknown; valid: {', '.join(get_args(EnsembleMethod))}")


def _check_no_weights(method: str, weights: object) -> None:
    if weights is not None:
        raise ValueError(f"method={method!r} takes no weights; valid with weights: {', '.join(_WEIGHTED)}")


def _checked(method: str, weights: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weights is None:
        raise ValueError(f"method={method!r} needs weights; valid: [wordings, questions]")
    if weights.shape != torch.Size(shape):
        raise ValueError(f"weights have shape {list(weights.shape)}; valid: {list(shape)}, [wordings, questions]")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(f"weights={weights.tolist()}; valid: finite numbers >= 0")
    return weights
