"""Locality-sensitive hashing of inner products: how MagicPig lifts queries and keys, hashes and compares them.

Keys are centred, divided by the largest norm and given one more coordinate, which makes them unit vectors: the angle to
a query orders them as the inner product does. A bit is the side of a random hyperplane; a table has K bits, and a key
is found in a table if all K agree, which happens with probability (1 - angle / pi)^K.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from flextok.attention.sparse.scores import grouped, repeat_heads, work_dtype


class Frame(NamedTuple):
    """How the keys of a batch entry and head are centred and scaled."""

    mean: Tensor
    """`(B, Hkv, 1, D)`"""
    radius: Tensor
    """`(B, Hkv, 1, 1)`: the largest norm of a centred key."""


def frame_of(keys: Float[Tensor, "B Hkv Sk D"], *, center: bool) -> Frame:
    """Mean, zeros without `center`, and radius of these keys."""
    keys = keys.to(work_dtype(keys.dtype))
    mean = keys.mean(2, keepdim=True) if center else torch.zeros_like(keys[:, :, :1])
    return Frame(mean, (keys - mean).norm(dim=-1, keepdim=True).amax(2, keepdim=True))


def lift_keys(keys: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """`(B, Hkv, S, D)` to `(B, Hkv, S, D + 1)`, unit vectors for keys no longer than the radius; and to lengths.

    A lifted key times its length `(B, Hkv, S)` is the centred key with one more coordinate: lengths are the radius, or
    the norms of centred keys that came later and are longer, and never 0.
    """
    centred = keys.to(frame.mean.dtype) - frame.mean
    norm = centred.norm(dim=-1, keepdim=True)
    scale = frame.radius.masked_fill(frame.radius == 0, 1)
    height = (frame.radius.square() - norm.square()).clamp_(min=0).sqrt() / scale
    # Without a radius (a single key, centred, is zero) the last coordinate alone makes it a unit vector.
    height = torch.where(frame.radius > 0, height, (norm == 0).to(height.dtype))
    lengths = torch.maximum(norm, frame.radius)
    return torch.cat([centred / scale, height], -1), lengths.masked_fill(lengths == 0, 1)[..., 0]


def lift_queries(queries: Tensor, frame: Frame) -> Tensor:
    """`(B, H, S, D)` to `(B, H, S, D + 1)`: unit vectors, and zeros for a query of zero."""
    centred = queries.to(frame.mean.dtype) - repeat_heads(frame.mean, queries.shape[1])
    norm = centred.norm(dim=-1, keepdim=True)
    return torch.nn.functional.pad(centred / norm.masked_fill(norm == 0, 1), (0, 1))


class Tables(NamedTuple):
    """L tables of K bits, and how these are stored, which changes no result."""

    number: int
    bits: int
    packing: str

    def hash(self, lifted: Tensor, projections: Tensor) -> Tensor:
        """Codes of `(B, h, S, D + 1)`: integers `(L, B, h, S)`, or signs `(L, B, h, K, S)` for packing "float32"."""
        sides = (lifted @ projections.to(lifted) > 0).unflatten(-1, (self.number, self.bits)).movedim(-2, 0)
        if self.packing == "float32":
            return sides.float().mul_(2).sub_(1).transpose(-1, -2).contiguous()
        weights = torch.ones((), dtype=torch.long, device=lifted.device) << torch.arange(
            self.bits, device=lifted.device
        )
        # The smallest type that holds them: comparing is limited by how much is read.
        narrow = next(dtype for bits, dtype in _CODE_TYPES.items() if self.bits <= bits)
        return (sides * weights).sum(-1).to(narrow)

    def found(self, query_codes: Tensor, key_codes: Tensor, min_tables: int) -> Tensor:
        """Pairs that agree in at least 1 or 2 tables, bool `(B, H, Sq, Sk)`."""
        batch, heads, num_queries = query_codes.shape[1], query_codes.shape[2], query_codes.shape[-1]
        once = twice = None
        for query, key in zip(query_codes, key_codes, strict=True):
            if self.packing == "float32":
                rows = grouped(query.transpose(-1, -2), key.shape[1])
                agree = rows @ key == self.bits
            else:
                agree = query.reshape(batch, key.shape[1], -1)[..., None] == key[:, :, None]
            again = None if once is None else once & agree
            twice = again if twice is None or again is None else twice.logical_or_(again)
            once = agree if once is None else once.logical_or_(agree)
        result = once if min_tables == 1 else twice
        if result is None:
            assert once is not None
            result = torch.zeros_like(once)
        return result.reshape(batch, heads, num_queries, -1)


_CODE_TYPES = {8: torch.uint8, 15: torch.int16, 31: torch.int32, 64: torch.int64}


def collision_probability(cosine: Float[Tensor, "..."], tables: Tables, min_tables: int) -> Float64[Tensor, "..."]:
    """With what probability vectors of this cosine agree in at least 1 or 2 tables, above 0."""
    angle = cosine.double().clamp(-1, 1).arccos()
    one = (1 - angle / math.pi) ** tables.bits
    none = tables.number * torch.log1p(-one)
    at_least = -torch.expm1(none)
    if min_tables == 2:
        at_least = at_least - tables.number * one * (1 - one) ** (tables.number - 1)
    # A pair that was found can be found, whatever rounding makes of an angle of pi.
    return at_least.clamp(min=torch.finfo(torch.float32).tiny, max=1)
