"""`masked_attention`: attention under a mask of inclusion probabilities, from all logits. Fast paths equal it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import dropout as apply_dropout

from flextok.attention.sparse.config import Number
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.scores import allowed_pairs, check_shapes, grouped, logits, work_dtype


def masked_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    scaling: Number,
    attention_mask: Tensor | None = None,
    dropout: Number = 0.0,
    training: bool = False,
) -> tuple[Float[Tensor, "B Sq H Dv"], Float[Tensor, "B H Sq Sk"]]:
    """Softmax over the selected allowed keys, each weighted by 1 / probability; rows without any give zeros.

    Args:
        queries: `(B, H, Sq, D)`; keys `(B, Hkv, Sk, D)`; values `(B, Hkv, Sk, Dv)`.
        mask: `(B, H, Sq, Sk)`.
        scaling: factor of `q . k`.
        attention_mask: None, bool (True attends) or additive, broadcastable to `(B, H, Sq, >= Sk)`.
        dropout: probability with which a normalised weight is dropped, in training.

    Returns:
        Output in the type of the queries, and the weights before dropout, float32: they sum to 1 in each row, are 0 for
        keys that are not selected and larger than dense ones for keys that were drawn.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shapes(queries, keys, values)
    scores = weighted_logits(queries, keys, mask, scaling, attention_mask)
    # Over selected keys alone: a large logit that is not selected would make all others underflow.
    highest = scores.detach().amax(-1, keepdim=True) if keys.shape[2] else scores.new_zeros(*scores.shape[:3], 1)
    terms = (scores - highest.masked_fill(highest == float("-inf"), 0)).exp()
    total = terms.sum(-1, keepdim=True)
    weights = terms / total.masked_fill(total == 0, 1)
    dropped = apply_dropout(weights, dropout, training)
    output = grouped(dropped, keys.shape[1]) @ values.to(work_dtype(values.dtype)).to(dropped.dtype)
    output = output.reshape(*queries.shape[:3], values.shape[3]).transpose(1, 2)
    return output.to(queries.dtype), weights.float()


def weighted_logits(
    queries: Tensor, keys: Tensor, mask: Mask, scaling: Number, attention_mask: Tensor | None
) -> Float[Tensor, "B H Sq Sk"]:
    """Logits less the logarithm of the probability; -inf where a pair is not selected or not allowed."""
    scores = logits(queries, keys, scaling, attention_mask)
    if mask.shape != tuple(scores.shape):
        raise ValueError(f"mask has shape {list(mask.shape)}; valid: {list(scores.shape)}")
    allowed = allowed_pairs(attention_mask, scores.shape)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask.is_full_mask():
        return scores
    probability = mask.get_dense_mask().to(scores.dtype)
    # log(0) is -inf, and -(-inf) would select what is not to be.
    return torch.where(probability > 0, scores - probability.log(), float("-inf"))
