"""Segments: texts side by side that see only themselves, until a place from which on everything is seen.

Tokens before `fusion_start` are being read: each sees the earlier tokens of its own segment, and of the segments that
`adjacency` opens to it. Tokens from `fusion_start` on see all tokens before them. Tokens between segments ("gaps")
belong to none; tokens past the end of `segment_ids` are those that a model has generated so far.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.attention.masks.compose import or_masks
from flextok.attention.masks.mask_mod import MaskMod, check_dtype, check_row_values, check_table, lookup, lookup_row

GapRows = Literal["self", "masked"]
GapKeys = Literal["visible", "hidden"]
Span = Sequence[int]


def segment_fusion(
    segment_ids: Tensor,
    fusion_start: int | Tensor,
    *,
    adjacency: Tensor | None = None,
    gap_rows: GapRows = "self",
    gap_keys: GapKeys = "visible",
    valid: Tensor | None = None,
) -> MaskMod:
    """Causal; segments apart before `fusion_start`, joined from there on.

    Args:
        segment_ids: integers `[length]` or `[batch, length]`, -1 for tokens in no segment.
        fusion_start: first token that sees everything; one for all rows, or `[batch]`.
        adjacency: bool `[segments, segments]`, which segment (row) sees which (column) while it is read; None lets
            each see itself.
        gap_rows: `self` lets every token see at least itself; `masked` leaves tokens in no segment without any key
            while they are read. Backends differ in what they make of such rows, so run no model on `masked`.
        gap_keys: whether tokens from `fusion_start` on see the tokens in no segment before it.
        valid: bool like `segment_ids`, False for padding: no other token sees it, and it joins nothing.
    """
    _check_choice("gap_rows", gap_rows, get_args(GapRows))
    _check_choice("gap_keys", gap_keys, get_args(GapKeys))
    ids, start = segment_ids, torch.as_tensor(fusion_start, device=segment_ids.device)
    is_valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    _check_tensors(ids, start, adjacency, is_valid)

    sees = None if adjacency is None else adjacency.to(ids.device)
    joins = is_valid
    if gap_keys == "hidden":
        joins = joins & ((ids >= 0) | (torch.arange(ids.shape[-1], device=ids.device) >= start[..., None]))
    # One more column stands for every generated token: in no segment, valid, visible.
    of_queries, of_keys = (F.pad(table, (0, 1), value=-1) for table in (ids, torch.where(is_valid, ids, -1)))
    joining_queries, joining_keys = (F.pad(table, (0, 1), value=True) for table in (is_valid, joins))

    def fused(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        generated = of_queries.shape[-1] - 1
        q, k = q_idx.clamp(max=generated), kv_idx.clamp(max=generated)
        of_query, of_key = lookup(of_queries, b, q), lookup(of_keys, b, k)
        is_open = of_query == of_key if sees is None else sees[of_query.clamp(min=0), of_key.clamp(min=0)]
        joined_from = lookup_row(start, b)
        apart = (q_idx < joined_from) & (kv_idx < joined_from) & (of_query >= 0) & (of_key >= 0) & is_open
        joined = (q_idx >= joined_from) & lookup(joining_queries, b, q) & lookup(joining_keys, b, k)
        return (kv_idx <= q_idx) & (apart | joined)

    return or_masks(fused, _own_token) if gap_rows == "self" else fused


def create_flex_attention_mask(
    segment_positions: Sequence[Span], generated_start_idx: int, *, device: torch.device | str | None = None
) -> MaskMod:
    """`segment_fusion` of segments given as `(start, end)`, each seeing itself; tokens in none see nothing."""
    segment_ids = segment_ids_from_spans(segment_positions, generated_start_idx, device)
    return segment_fusion(segment_ids, generated_start_idx, gap_rows="masked")


create_segment_isolation_mask = create_flex_attention_mask


def segment_ids_from_spans(spans: Sequence[Span], length: int, device: torch.device | str | None = None) -> Tensor:
    """int64 `[length]`: in which of `spans`, each `(start, end)` without the end, a token lies; -1 in none.

    ValueError for no span, and for one that is empty, leaves the row or overlaps another.
    """
    if not spans:
        raise ValueError(f"spans={spans!r}; valid: one (start, end) per segment, at least one")
    segment_ids = [-1] * length
    for number, (start, end) in enumerate(spans):
        if not 0 <= start < end <= length:
            raise ValueError(f"spans[{number}]={(start, end)}; valid: 0 <= start < end <= length {length}")
        other = max(segment_ids[start:end])
        if other >= 0:
            raise ValueError(
                f"spans[{number}]={(start, end)} overlaps spans[{other}]; valid: each token in one segment"
            )
        segment_ids[start:end] = [number] * (end - start)
    return torch.tensor(segment_ids, device=device)


def isolation_adjacency(n: int, shared_prefix: bool = False) -> Tensor:
    """bool `[n, n]`: each segment sees itself, and segment 0 if that is a `shared_prefix`."""
    if n < 1:
        raise ValueError(f"n={n}; valid: 1 segment or more")
    adjacency = torch.eye(n, dtype=torch.bool)
    adjacency[:, 0] |= shared_prefix
    return adjacency


def _own_token(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx == kv_idx


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; valid: {', '.join(choices)}")


def _check_tensors(ids: Tensor, start: Tensor, adjacency: Tensor | None, is_valid: Tensor) -> None:
    check_table("segment_ids", ids, "integer")
    check_row_values("fusion_start", start)
    check_table("valid", is_valid, "bool")
    length = ids.shape[-1]
    if length == 0:
        raise ValueError("segment_ids is empty; valid: one number per token, at least one token")
    if is_valid.shape[-1] != length:
        raise ValueError(f"valid covers {is_valid.shape[-1]} tokens; valid: the {length} of segment_ids")
    batches = {*ids.shape[:-1], *start.shape, *is_valid.shape[:-1]}
    if len(batches) > 1:
        raise ValueError(f"segment_ids, fusion_start and valid are for batches of {sorted(batches)}; valid: one size")
    if adjacency is not None:
        check_dtype("adjacency", adjacency, "bool")
        if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
            raise ValueError(f"adjacency has shape {list(adjacency.shape)}; valid: [segments, segments]")
    # A look at values: once per prompt, and not where a graph is being traced.
    if torch.compiler.is_compiling():
        return
    if not 0 <= int(start.min()) <= int(start.max()) <= length:
        raise ValueError(f"fusion_start={start.tolist()}; valid: 0 to {length}, the length of segment_ids")
    if adjacency is not None and int(ids.max()) >= adjacency.shape[0]:
        raise ValueError(f"segment_ids go up to {int(ids.max())}; valid: the {adjacency.shape[0]} rows of adjacency")
