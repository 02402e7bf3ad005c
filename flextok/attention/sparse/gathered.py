"""`gathered_attention`: attention that reads the selected keys and values and no others. For decoding."""

import torch
from torch import Tensor

from flextok.attention.sparse.attention import masked_attention
from flextok.attention.sparse.config import Number
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.scores import additive_bias, allowed_pairs, check_shapes, grouped, work_dtype
from flextok.attention.sparse.selection import Selection, rows_at


def gathered_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask | Selection,
    scaling: Number,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The output of `masked_attention`, `(B, Sq, H, Dv)`, from gathered rows of keys and values.

    Args:
        queries: `(B, H, Sq, D)`; keys `(B, Hkv, Sk, D)`; values `(B, Hkv, Sk, Dv)`.
        mask: a mask `(B, H, Sq, Sk)`, or columns and probabilities `(B, H, Sq, k)`.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shapes(queries, keys, values)
    shape = torch.Size((*queries.shape[:3], keys.shape[2]))
    if isinstance(mask, Mask) and mask.shape != tuple(shape):
        raise ValueError(f"mask has shape {list(mask.shape)}; valid: {list(shape)}")
    if mask.is_full_mask() if isinstance(mask, Mask) else mask.is_everything(shape[-1]):
        full = Mask.create_full_mask(shape, torch.float32, queries.device)
        return masked_attention(queries, keys, values, full, scaling, attention_mask)[0]
    columns, probabilities = _from_mask(mask) if isinstance(mask, Mask) else mask
    if columns.shape[:3] != shape[:3] or columns.shape != probabilities.shape:
        raise ValueError(
            f"columns have shape {list(columns.shape)}, probabilities {list(probabilities.shape)}; "
            f"valid: both {[*shape[:3], 'k']}"
        )
    columns = columns.masked_fill(probabilities == 0, 0)
    chosen = probabilities > 0
    allowed, bias = allowed_pairs(attention_mask, shape), additive_bias(attention_mask, shape)
    if allowed is not None:
        chosen = chosen & allowed.expand(shape).gather(-1, columns)
    dtype = work_dtype(queries.dtype)
    by_head = columns.reshape(*grouped(queries, keys.shape[1]).shape[:3], columns.shape[-1])
    queries_by_head = grouped(queries, keys.shape[1]).to(dtype)
    scores = (rows_at(keys, by_head).to(dtype) @ queries_by_head[..., None]).reshape(columns.shape) * scaling
    if bias is not None:
        scores = scores + bias.expand(shape).gather(-1, columns).to(dtype)
    scores = (scores - probabilities.to(dtype).log()).masked_fill(~chosen, float("-inf"))
    # A row without keys has only -inf and its softmax is NaN; a list of width 0 has a sum over nothing, which is 0.
    weights = scores.softmax(-1).masked_fill(~chosen, 0).reshape(by_head.shape)
    output = weights[..., None, :] @ rows_at(values, by_head).to(dtype)
    return output.reshape(*shape[:3], values.shape[3]).transpose(1, 2).to(queries.dtype)


def _from_mask(mask: Mask) -> Selection:
    """The compressed rows of a mask, padded to the longest."""
    indices, ptr, data = mask.get_index_mask()
    lengths = ptr.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    row = torch.arange(len(lengths), device=indices.device).repeat_interleave(lengths)
    place = torch.arange(len(indices), device=indices.device) - ptr[row]
    columns = torch.zeros(len(lengths), longest, dtype=torch.long, device=indices.device)
    probabilities = torch.zeros(len(lengths), longest, dtype=torch.float32, device=indices.device)
    columns[row, place] = indices - row * mask.shape[-1]
    probabilities[row, place] = data.float()
    return Selection(*(x.reshape(*mask.shape[:-1], longest) for x in (columns, probabilities)))
