"""`windowed_attention`: geometric maskers on any device, without FlexAttention. A chunk of queries reads only its keys.

On a CPU this is how a window pays; it has gradients. On CUDA a block mask and FlexAttention do the same in one kernel.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flextok.attention.sparse.block_mask import key_ranges, to_mask_mod
from flextok.attention.sparse.config import MaskerConfig, Number
from flextok.attention.sparse.geometric import KeyRange
from flextok.attention.sparse.scores import additive_bias, allowed_pairs, check_shapes


class Chunk(NamedTuple):
    """Neighbouring queries, and the keys that one of them sees."""

    queries: slice
    spans: list[tuple[int, int]]
    """The keys as disjoint runs `(start, stop)`, ascending; none if no query sees any."""
    row: Tensor
    """int64 `[queries, 1]`."""
    column: Tensor
    """int64 `[keys]`."""
    active: Tensor
    """bool `[queries, keys]`: the pairs."""


def windowed_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    masker_configs: Sequence[MaskerConfig],
    scaling: Number,
    attention_mask: Tensor | None = None,
    chunk_size: int = 128,
    in_order: bool = False,
) -> Tensor:
    """The output of `masked_attention` under the mask of geometric maskers (sink, local, causal), `(B, Sq, H, Dv)`.

    Args:
        queries: `(B, H, Sq, D)`; keys `(B, Hkv, Sk, D)`; values `(B, Hkv, Sk, Dv)`.
        attention_mask: None, bool (True attends) or additive, broadcastable to `(B, H, Sq, >= Sk)`.
        chunk_size: queries that are computed at once, with every key that one of them sees.
        in_order: no query sees a later key, as an attention mask would say, but nothing is computed for it.

    Raises:
        ValueError: shapes do not fit, or a masker chooses by more than the place of a key.
    """
    check_shapes(queries, keys, values)
    num_queries, num_keys = queries.shape[2], keys.shape[2]
    shape = torch.Size((*queries.shape[:3], num_keys))
    allowed, bias = allowed_pairs(attention_mask, shape), additive_bias(attention_mask, shape)
    outputs = []
    for chunk in chunks_of(masker_configs, num_queries, num_keys, queries.device, chunk_size, in_order=in_order):
        chosen = queries[:, :, chunk.queries]
        if not chunk.spans:
            outputs.append(chosen.new_zeros(*chosen.shape[:3], values.shape[3]))
            continue
        active = chunk.active[None, None]
        if allowed is not None:
            active = active & _part(allowed, chunk.row, chunk.column)
        mask = active
        if bias is not None:
            mask = _part(bias, chunk.row, chunk.column).to(queries.dtype).masked_fill(~active, float("-inf"))
        output = scaled_dot_product_attention(
            chosen,
            _joined(keys, chunk.spans),
            _joined(values, chunk.spans),
            mask,
            scale=float(scaling),
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        # An additive mask of nothing but -inf gives NaN.
        outputs.append(output if bias is None else output.masked_fill(~active.any(-1, keepdim=True), 0))
    return torch.cat(outputs, 2).transpose(1, 2)


def chunks_of(
    masker_configs: Sequence[MaskerConfig],
    num_queries: int,
    num_keys: int,
    device: torch.device,
    chunk_size: int = 128,
    *,
    in_order: bool = False,
) -> Iterator[Chunk]:
    """All queries in chunks; arguments and errors are those of `windowed_attention`."""
    ranges = key_ranges(masker_configs, num_queries, num_keys)
    mask_mod = to_mask_mod(masker_configs, num_queries, num_keys)
    offset = num_keys - num_queries
    zero = torch.zeros((), dtype=torch.long, device=device)
    for begin in range(0, num_queries, chunk_size):
        end = min(begin + chunk_size, num_queries)
        last = end + offset if in_order else num_keys
        spans = list(_spans(ranges, begin + offset, end - 1 + offset, last))
        row = torch.arange(begin, end, device=device)[:, None]
        column = torch.cat([torch.arange(*span, device=device) for span in spans] or [row.new_empty(0)])
        active = mask_mod(zero, zero, row, column).broadcast_to(end - begin, len(column))
        yield Chunk(slice(begin, end), spans, row, column, active & (column <= row + offset) if in_order else active)


def _spans(ranges: Sequence[KeyRange], first: int, last: int, num_keys: int) -> Iterator[tuple[int, int]]:
    """Disjoint runs, in order, that hold whatever queries at positions `first` to `last` see of `num_keys` keys."""
    cut = sorted((max(found.bounds(first)[0], 0), min(found.bounds(last)[1], num_keys)) for found in ranges)
    reached = 0
    for start, stop in cut:
        if stop > max(start, reached):
            yield max(start, reached), stop
            reached = stop


def _part(table: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Rows and columns of the last two dimensions; those of size 1 serve every index."""
    return table[:, :, row * (table.shape[2] > 1), column * (table.shape[3] > 1)]


def _joined(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    parts = [x[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
