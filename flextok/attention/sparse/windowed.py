"""`windowed_attention`: geometric maskers on any device, without FlexAttention. A chunk of queries reads only its keys.

On a CPU this is how a window pays; it has gradients. On CUDA a block mask and FlexAttention do the same in one kernel.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flextok.attention.sparse.block_mask import key_ranges, to_mask_mod
from flextok.attention.sparse.config import MaskerConfig, Number
from flextok.attention.sparse.geometric import KeyRange
from flextok.attention.sparse.scores import additive_bias, allowed_pairs, check_shapes


def windowed_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    masker_configs: Sequence[MaskerConfig],
    scaling: Number,
    attention_mask: Tensor | None = None,
    chunk_size: int = 128,
) -> Tensor:
    """The output of `masked_attention` under the mask of geometric maskers (sink, local, causal), `(B, Sq, H, Dv)`.

    Args:
        queries: `(B, H, Sq, D)`; keys `(B, Hkv, Sk, D)`; values `(B, Hkv, Sk, Dv)`.
        attention_mask: None, bool (True attends) or additive, broadcastable to `(B, H, Sq, >= Sk)`.
        chunk_size: queries that are computed at once, with every key that one of them sees.

    Raises:
        ValueError: shapes do not fit, or a masker chooses by more than the place of a key.
    """
    check_shapes(queries, keys, values)
    num_queries, num_keys = queries.shape[2], keys.shape[2]
    ranges = key_ranges(masker_configs, num_queries, num_keys)
    mask_mod = to_mask_mod(masker_configs, num_queries, num_keys)
    shape = torch.Size((*queries.shape[:3], num_keys))
    allowed, bias = allowed_pairs(attention_mask, shape), additive_bias(attention_mask, shape)
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    outputs = []
    for begin in range(0, num_queries, chunk_size):
        end = min(begin + chunk_size, num_queries)
        spans = list(_spans(ranges, begin, end, num_queries, num_keys))
        if not spans:
            outputs.append(queries.new_zeros(*queries.shape[:2], end - begin, values.shape[3]))
            continue
        row = torch.arange(begin, end, device=queries.device)[:, None]
        column = torch.cat([torch.arange(*span, device=queries.device) for span in spans])
        active = mask_mod(zero, zero, row, column).broadcast_to(end - begin, len(column))[None, None]
        if allowed is not None:
            active = active & _part(allowed, row, column)
        mask = active
        if bias is not None:
            mask = _part(bias, row, column).to(queries.dtype).masked_fill(~active, float("-inf"))
        chunk = scaled_dot_product_attention(
            queries[:, :, begin:end],
            _joined(keys, spans),
            _joined(values, spans),
            mask,
            scale=float(scaling),
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        # An additive mask of nothing but -inf gives NaN.
        outputs.append(chunk if bias is None else chunk.masked_fill(~active.any(-1, keepdim=True), 0))
    return torch.cat(outputs, 2).transpose(1, 2)


def _spans(
    ranges: Sequence[KeyRange], begin: int, end: int, num_queries: int, num_keys: int
) -> Iterator[tuple[int, int]]:
    """Disjoint runs of keys, in order, that hold whatever queries `begin` to `end` see."""
    offset = num_keys - num_queries
    bounds = [(found.bounds(begin + offset)[0], found.bounds(end - 1 + offset)[1]) for found in ranges]
    cut = sorted((max(start, 0), min(stop, num_keys)) for start, stop in bounds)
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
