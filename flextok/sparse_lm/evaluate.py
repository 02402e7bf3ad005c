"""What maskers cost a causal LM: perplexity of a text and needles found; and the speed of decoding."""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from flextok.attention.sparse import build_config
from flextok.sparse_lm.attention import sparse_attention
from flextok.sparse_lm.needles import Needle
from flextok.sparse_lm.state import SparseState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Specs = Sequence[dict[str, Any]] | None
"""Maskers, as `build_config` takes them; None is the model as it is."""
_PREFILL_CHUNK = 512


def attention_of(model: "PreTrainedModel", specs: Specs, **options: Any) -> AbstractContextManager[SparseState | None]:
    """`sparse_attention` under these maskers, or nothing."""
    return nullcontext() if specs is None else sparse_attention(model, build_config(specs), **options)


@torch.no_grad()
def perplexity(
    model: "PreTrainedModel", ids: Tensor, specs: Specs, *, context: int, windows: int, batch_size: int = 8
) -> dict[str, float]:
    """Of the second halves of windows of a text: their tokens see half a window or more.

    Args:
        ids: int64 `[tokens]`.
        context: tokens of a window.
        windows: at most so many, one after another.

    Returns:
        `perplexity`, `tokens` that were predicted, and `density`: of the pairs that their queries see.

    Raises:
        ValueError: a context below 4 tokens, a text shorter than one window.
    """
    count = min(windows, (len(ids) - 1) // context) if context >= 4 else 0
    if count < 1:
        raise ValueError(f"a text of {len(ids)} tokens, context {context}; valid: 4 or more, and a longer text")
    pieces = torch.stack([ids[start : start + context + 1] for start in range(0, count * context, context)])
    half = context // 2
    total, tokens = 0.0, 0
    with attention_of(model, specs, measure=True) as state:
        pairs = [0, 0]
        for batch in pieces.to(model.device).split(batch_size):
            cache = DynamicCache()
            model(batch[:, :half], past_key_values=cache, use_cache=True, logits_to_keep=1)
            before = (state.num_pairs, state.num_possible) if state else (0, 0)
            logits: Tensor = model(batch[:, half:-1], past_key_values=cache, use_cache=True).logits
            if state is not None:
                pairs = [pairs[0] + state.num_pairs - before[0], pairs[1] + state.num_possible - before[1]]
            labels = batch[:, half + 1 :]
            total += float(cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum"))
            tokens += labels.numel()
    density = pairs[0] / pairs[1] if pairs[1] else 1.0
    return {"perplexity": math.exp(total / tokens), "density": density, "tokens": tokens}


@torch.no_grad()
def needles_found(
    model: "PreTrainedModel",
    needles: Sequence[Needle],
    specs: Specs,
    *,
    dense_prefill: bool = False,
    batch_size: int = 8,
    report: Callable[[int], Any] = lambda _: None,
) -> float:
    """The share of needles of which every token of the answer is the likeliest.

    All but the last token of a prompt are read at once, that one and the answer in steps of decoding.
    """
    right = 0
    for start in range(0, len(needles), batch_size):
        chosen = needles[start : start + batch_size]
        with attention_of(model, specs, dense_prefill=dense_prefill):
            right += _num_right(model, chosen)
        report(len(chosen))
    return right / len(needles)


def _num_right(model: "PreTrainedModel", needles: Sequence[Needle]) -> int:
    longest = max(len(needle.prompt) for needle in needles)
    mask = torch.tensor([[0] * (longest - len(n.prompt)) + [1] * len(n.prompt) for n in needles], device=model.device)
    ids = torch.tensor([[0] * (longest - len(n.prompt)) + n.prompt for n in needles], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache,
          use_cache=True, logits_to_keep=1)  # fmt: skip
    token, position, answers = ids[:, -1:], positions[:, -1:], list[Tensor]()
    for _ in range(max(len(needle.answer) for needle in needles)):
        logits: Tensor = model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits
        token, position = logits[:, -1:].argmax(-1), position + 1
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        answers.append(token[:, 0])
    rows = torch.stack(answers, 1).tolist()
    return sum(row[: len(n.answer)] == n.answer for row, n in zip(rows, needles, strict=True))


@torch.no_grad()
def decode_speed(
    model: "PreTrainedModel", ids: Tensor, specs: Specs, *, length: int, steps: int = 16, repeats: int = 3
) -> dict[str, float]:
    """Tokens per second of one sequence after `length` tokens, dense and sparse in turns, without their first step.

    Args:
        ids: int64 `[tokens]` of a text, which is repeated to `length`.

    Returns:
        Medians over repeats: `dense` and `sparse` in tokens per second, their `ratio`, and `first_step` in seconds,
        in which maskers hash all keys; `difference`: the largest one of logits to the dense ones, over all steps.
    """
    text = ids.repeat(-(-length // len(ids)))[:length].to(model.device)[None]
    filled = DynamicCache()
    for piece in text.split(_PREFILL_CHUNK, 1):
        model(piece, past_key_values=filled, use_cache=True, logits_to_keep=1)
    times: dict[str, list[float]] = {"dense": [], "sparse": [], "first_step": []}
    difference = 0.0
    for _ in range(repeats):
        logits: list[Tensor] = []
        for name, mine in (("dense", None), ("sparse", specs)):
            cache = deepcopy(filled)  # Steps grow it, and both have to begin with the same keys.
            with attention_of(model, mine):
                first = _timed_steps(model, text[:, :1], cache, 1, logits)
                times[name].append(_timed_steps(model, text[:, 1:], cache, steps, logits) / steps)
            if name == "sparse":
                times["first_step"].append(first)
        dense, sparse = logits[: len(logits) // 2], logits[len(logits) // 2 :]
        difference = max(float((a - b).abs().max()) for a, b in zip(dense, sparse, strict=True))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "dense": 1 / seconds["dense"],
        "sparse": 1 / seconds["sparse"],
        "ratio": statistics.median(d / s for d, s in zip(times["dense"], times["sparse"], strict=True)),
        "first_step": seconds["first_step"],
        "difference": difference,
    }


def _timed_steps(model: Any, tokens: Tensor, cache: DynamicCache, steps: int, logits: list[Tensor]) -> float:
    started = perf_counter()
    for step in range(steps):
        place = step % tokens.shape[1]
        logits.append(model(tokens[:, place : place + 1], past_key_values=cache).logits)
    if logits[-1].device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - started
