"""Several wordings of one prompt as one sequence of tokens: where each lies, and which positions its tokens have.

    [prefix] [wording 1] separator [wording 2] separator ... [wording n] [tail]

Each wording sees the prefix and itself; the tail, and what is generated after it, sees everything. Wordings are
tokenised one by one and their ids put one after another: text that is joined and tokenised again has other tokens at
the seams, and then the places of the wordings are wrong.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flextok.attention.masks.segments import isolation_adjacency, segment_ids_from_spans

Positions = Literal["restart", "running", "aligned"]
Span = tuple[int, int]


class MissingTailWarning(UserWarning):
    """Several wordings and no token after them that sees them all."""


@dataclass(frozen=True)
class PackedPrompt:
    """Wordings of one prompt side by side, ready to be read in one pass."""

    input_ids: Tensor
    """int64 `[length]`."""
    segment_ids: Tensor
    """int64 `[length]`: the segment of each token, -1 for separators and the tail."""
    position_ids: Tensor
    """int64 `[length]`."""
    spans: tuple[Span, ...]
    """`(start, end)` of each segment, end not included; the first one is the prefix if there is one."""
    fusion_start: int
    """The first token that sees all segments: the first of the tail, or the first generated one."""
    next_position: int
    """Position of the first generated token."""
    adjacency: Tensor
    """bool `[segments, segments]`: which segment (row) sees which (column)."""
    has_prefix: bool = False
    """Whether segment 0 is a prefix and no wording."""

    @property
    def wording_spans(self) -> tuple[Span, ...]:
        """The spans without that of the prefix."""
        return self.spans[self.has_prefix :]

    def __len__(self) -> int:
        return len(self.input_ids)


def pack_segments(
    segments: Sequence[Sequence[int]],
    *,
    prefix: Sequence[int] = (),
    separator: Sequence[int] = (),
    tail: Sequence[int] = (),
    positions: Positions = "restart",
) -> PackedPrompt:
    """Put token ids of wordings side by side.

    Args:
        segments: token ids of each wording, none of them empty.
        prefix: tokens that all wordings see, read once.
        separator: tokens between wordings. They belong to none: the wordings are kept apart by the mask, and what is
            generated sees separators, too, so that the order of wordings begins to matter.
        tail: tokens after the last wording, the first that see all of them. Without one the first generated token is
            predicted from the last wording alone.
        positions: `restart` counts each wording from the end of the prefix, `aligned` so that all end at the same
            position (without a prefix only), `running` through the whole sequence.

    Raises:
        ValueError: no wording, an empty one, unknown `positions`, `aligned` with a prefix.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r} is unknown; valid: {', '.join(get_args(Positions))}")
    if prefix and positions == "aligned":
        raise ValueError("positions='aligned' with a prefix; valid: restart or running, which keep wordings next to it")
    if not segments:
        raise ValueError("segments is empty; valid: token ids of one wording or more")
    empty = [number for number, segment in enumerate(segments) if len(segment) == 0]
    if empty:
        raise ValueError(f"segments[{empty[0]}] has no tokens; valid: one token or more in each")
    _warn_without_tail(len(segments), tail)
    parts = [list(prefix)] if prefix else []
    for number, segment in enumerate(segments):
        parts += [[*segment, *(separator if number < len(segments) - 1 else ())]]
    starts = [0, *accumulate(map(len, parts))]
    lengths = [len(prefix)] * bool(prefix) + [len(segment) for segment in segments]
    spans = tuple((start, start + length) for start, length in zip(starts[:-1], lengths, strict=True))
    fusion_start, longest = starts[-1], max(map(len, segments))
    length = fusion_start + len(tail)

    joined_at = fusion_start if positions == "running" else len(prefix) + longest
    position_ids = torch.arange(length) - fusion_start + joined_at
    if positions != "running":
        for start, part, num_tokens in zip(starts, parts, lengths, strict=False):
            first = longest - num_tokens if positions == "aligned" else min(start, len(prefix))
            position_ids[start : start + len(part)] = torch.arange(first, first + len(part))
    return PackedPrompt(
        input_ids=torch.tensor([token for part in [*parts, list(tail)] for token in part], dtype=torch.long),
        segment_ids=segment_ids_from_spans(spans, length),
        position_ids=position_ids,
        spans=spans,
        fusion_start=fusion_start,
        next_position=joined_at + len(tail),
        adjacency=isolation_adjacency(len(spans), shared_prefix=bool(prefix)),
        has_prefix=bool(prefix),
    )


def pack_prompts(
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    prefix: str = "",
    separator: str | None = None,
    tail: str = "",
    positions: Positions = "restart",
) -> PackedPrompt:
    """Tokenise wordings one by one and pack them; the options are those of `pack_segments`.

    Special tokens, such as BOS, are those that the tokenizer adds to a text by itself: each wording gets its own, or
    the prefix alone if there is one.
    """
    if not prompts:
        raise ValueError("prompts is empty; valid: one wording or more")
    with_special = not prefix
    segments = [_ids(tokenizer, prompt, with_special) for prompt in prompts]
    empty = [number for number, segment in enumerate(segments) if not segment]
    if empty:
        raise ValueError(f"prompts[{empty[0]}]={prompts[empty[0]]!r} has no tokens; valid: texts of one token or more")
    tail_ids = _ids(tokenizer, tail, False) if tail else []
    _warn_without_tail(len(segments), tail_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingTailWarning)  # given already, and where the caller is
        return pack_segments(
            segments,
            prefix=_ids(tokenizer, prefix, True) if prefix else (),
            separator=_ids(tokenizer, separator, False) if separator else (),
            tail=tail_ids,
            positions=positions,
        )


def concatenate_paraphrases_with_positions(
    prompts: Sequence[str], tokenizer: Any, separator: str = "\n\n[SEP]\n\n"
) -> tuple[str, list[Span], int]:
    """The joined text, the span of each prompt in tokens, and their number, all without special tokens.

    For reports only: the spans count the tokens of prompts and separators tokenised one by one, which is not how the
    joined text would be tokenised.
    """
    if not prompts:
        raise ValueError("prompts is empty; valid: one wording or more")
    lengths = [len(_ids(tokenizer, prompt, False)) for prompt in prompts]
    step = len(_ids(tokenizer, separator, False)) if separator else 0
    starts = list(accumulate((length + step for length in lengths), initial=0))[:-1]
    spans = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return separator.join(prompts), spans, spans[-1][1]


def _warn_without_tail(num_wordings: int, tail: Sequence[int]) -> None:
    if not tail and num_wordings > 1:
        text = "without a tail the first generated token is predicted from the last wording alone"
        warnings.warn(text, MissingTailWarning, stacklevel=3)


def _ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return ids
