"""Packed prompts of any lengths as one left-padded batch, so that all of them end, and go on, in the same column."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from flextok.attention.masks.segments import isolation_adjacency
from flextok.fusion.packing import PackedPrompt


@dataclass(frozen=True)
class PromptBatch:
    """Rows of `length` tokens, padding first. All tensors are on one device."""

    input_ids: Tensor
    """int64 `[batch, length]`."""
    position_ids: Tensor
    """int64 `[batch, length]`; 0 for padding."""
    segment_ids: Tensor
    """int64 `[batch, length]`, -1 in no segment; no two rows share a segment."""
    valid: Tensor
    """bool `[batch, length]`, False for padding."""
    fusion_start: Tensor
    """int64 `[batch]`, counted from the start of the padded row."""
    next_position: Tensor
    """int64 `[batch]`."""
    adjacency: Tensor | None
    """bool `[segments of all rows, segments of all rows]`; None lets each segment see itself."""
    log_weights: Tensor | None
    """float32 `[batch, length]` to add to the scores of a key for queries from `fusion_start` on; None for zeros."""

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self.input_ids.shape[1]

    def select(self, rows: Tensor) -> "PromptBatch":
        """The batch of these rows, int64 `[rows]`."""
        of_rows = {name: value[rows] for name, value in vars(self).items() if name != "adjacency" and value is not None}
        return replace(self, **of_rows)


def left_padded(
    prompts: Sequence[PackedPrompt],
    *,
    pad_token_id: int,
    device: torch.device,
    weights: Sequence[Sequence[float]] | None = None,
) -> PromptBatch:
    """One row per prompt.

    Args:
        weights: per prompt, how much each wording (without the prefix) counts where all are seen together, as if it
            were there so many times. Only their ratios to the prefix and the tail, which count once, matter; 0 hides a
            wording from the answer, and zeros for all wordings mean that all count once.

    Raises:
        ValueError: no prompt, and weights that are negative, not finite or not one per wording.
    """
    if not prompts:
        raise ValueError("prompts is empty; valid: one prompt or more")
    length = max(map(len, prompts))
    first = [length - len(prompt) for prompt in prompts]
    rows = range(len(prompts))

    def padded(columns: Sequence[Tensor], value: int) -> Tensor:
        table = torch.full((len(prompts), length), value, dtype=columns[0].dtype)
        for row, column in zip(rows, columns, strict=True):
            table[row, first[row] :] = column
        return table.to(device)

    is_isolated = all(torch.equal(p.adjacency, isolation_adjacency(len(p.spans))) for p in prompts)
    log_weights = [] if weights is None else [*_log_weights(prompts, weights)]
    has_weights = any(bool((column != 0).any()) for column in log_weights)
    num_before = accumulate((len(p.spans) for p in prompts), initial=0)
    ids = [torch.where(p.segment_ids >= 0, p.segment_ids + n, -1) for p, n in zip(prompts, num_before, strict=False)]
    columns = torch.arange(length, device=device)
    return PromptBatch(
        input_ids=padded([p.input_ids for p in prompts], pad_token_id),
        position_ids=padded([p.position_ids for p in prompts], 0),
        segment_ids=padded(ids, -1),
        valid=columns >= torch.tensor(first, device=device)[:, None],
        fusion_start=torch.tensor(
            [start + p.fusion_start for start, p in zip(first, prompts, strict=True)], device=device
        ),
        next_position=torch.tensor([p.next_position for p in prompts], device=device),
        adjacency=None if is_isolated else torch.block_diag(*(p.adjacency for p in prompts)).bool().to(device),
        log_weights=padded(log_weights, 0).float() if has_weights else None,
    )


def _log_weights(prompts: Sequence[PackedPrompt], weights: Sequence[Sequence[float]]) -> Iterator[Tensor]:
    if len(weights) != len(prompts):
        raise ValueError(f"weights are for {len(weights)} prompts; valid: one list for each of {len(prompts)}")
    for number, (prompt, row) in enumerate(zip(prompts, weights, strict=True)):
        spans = prompt.wording_spans
        values = torch.tensor(row, dtype=torch.float64)
        if values.shape != (len(spans),):
            raise ValueError(
                f"weights[{number}]={list(row)}; valid: one number for each of the {len(spans)} wordings of the prompt"
            )
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError(f"weights[{number}]={list(row)}; valid: finite numbers >= 0")
        if not bool(values.any()):
            values = torch.ones_like(values)
        column = torch.zeros(len(prompt), dtype=torch.float64)
        for (start, end), value in zip(spans, values.log(), strict=True):
            column[start:end] = value
        yield column
