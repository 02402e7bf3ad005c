"""MagicPig (arXiv 2410.16179): keys whose random hash codes agree with the query's, with the probability of that."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flextok.attention.sparse.config import (
    Given,
    Number,
    SamplingMaskerConfig,
    checked_bool,
    checked_choice,
    checked_int,
)
from flextok.attention.sparse.lsh import Frame, Tables, collision_probability, frame_of, lift_keys, lift_queries
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import SamplingMasker, check_grown, layer_of, state_of
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.scores import check_shapes, grouped
from flextok.attention.sparse.selection import Selection, columns_of, rows_at


@dataclass
class MagicPigConfig(SamplingMaskerConfig):
    """`lsh_l` tables of `lsh_k` bits."""

    lsh_l: Given[int]
    lsh_k: Given[int]
    center: Given[bool] = True
    """Subtract the mean of the keys, of each batch entry and key head, from keys and queries."""
    packing: Given[str] = "int64"
    """How codes are stored: int64 (up to 64 bits) or float32. The result is the same."""
    seed: Given[int] = 42
    """Of the hyperplanes: they are all the randomness there is, so errors with one seed are correlated."""
    min_tables: Given[int] = 1
    """In how many tables a key has to be found: 1, or 2 as in the original authors' code."""
    cache_keys: Given[bool] = False
    """Hash only keys that are new since the last call with the same `sparse_meta_data`. For keys that only grow; mean
    and largest norm stay those of the first call."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lsh_l, self.lsh_k = checked_int("lsh_l", self.lsh_l, 1), checked_int("lsh_k", self.lsh_k, 1)
        self.center = checked_bool("center", self.center)
        self.packing = checked_choice("packing", self.packing, ("int64", "float32"))
        if self.packing == "int64" and self.lsh_k > 64:
            raise ValueError(f"lsh_k={self.lsh_k}; valid: up to 64 bits with packing=int64")
        self.seed = checked_int("seed", self.seed, -(2**62))
        self.min_tables = checked_int("min_tables", self.min_tables, 1)
        if self.min_tables > 2:
            raise ValueError(f"min_tables={self.min_tables}; valid: 1 or 2")
        self.cache_keys = checked_bool("cache_keys", self.cache_keys)


class _Hashed(NamedTuple):
    frame: Frame
    codes: Tensor
    """The last dimension goes over keys."""
    lengths: Tensor
    """`(B, Hkv, Sk)`: what `lift_keys` says, by which a product with a centred key becomes a cosine."""


@MaskerRegistry.register(MagicPigConfig)
class MagicPig(SamplingMasker):
    """Adds the keys found in enough tables, each with the probability of being found."""

    config: MagicPigConfig

    def __init__(self, config: MagicPigConfig) -> None:
        super().__init__(config)
        self.tables = Tables(config.lsh_l, config.lsh_k, config.packing)

    @torch.no_grad()
    def add_mask(
        self,
        keys: Tensor,
        queries: Tensor,
        values: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        dropout: Number,
        sparse_meta_data: dict[Any, Any] | None,
        previous_mask: Mask,
        **kwargs: Any,
    ) -> Mask:
        if previous_mask.is_full_mask():
            return previous_mask
        hashed, directions, found = self._find(queries, keys, sparse_meta_data, layer_of(self, kwargs))
        centred = keys.to(directions.dtype) - hashed.frame.mean
        cosine = directions @ centred.transpose(-1, -2) / hashed.lengths[:, :, None]
        cosine = cosine.reshape(found.shape)
        value = torch.zeros(found.shape, device=keys.device)
        value[found] = collision_probability(cosine[found], self.tables, self.config.min_tables).float()
        return previous_mask.merge_mask(
            Mask.create_mask_from_dense_mask(previous_mask.shape, value, torch.float32, validate=False)
        )

    def _select(
        self,
        keys: Tensor,
        queries: Tensor,
        attention_mask: Tensor | None,
        sparse_meta_data: dict[Any, Any] | None,
        previous: Selection,
        **kwargs: Any,
    ) -> Selection:
        hashed, directions, found = self._find(queries, keys, sparse_meta_data, layer_of(self, kwargs))
        columns, is_entry = columns_of(found)
        by_head = columns.reshape(*directions.shape[:3], columns.shape[-1])
        # Only the keys that were found are read.
        centred = rows_at(keys, by_head).to(directions.dtype) - hashed.frame.mean[:, :, None]
        lengths = hashed.lengths[:, :, None].expand(*by_head.shape[:3], -1).gather(-1, by_head)
        cosine = ((centred @ directions[..., None])[..., 0] / lengths).reshape(columns.shape)
        probability = collision_probability(cosine, self.tables, self.config.min_tables).float()
        return Selection(columns, probability * is_entry)

    def _find(
        self, queries: Tensor, keys: Tensor, sparse_meta_data: dict[Any, Any] | None, layer: int
    ) -> tuple[_Hashed, Tensor, Tensor]:
        """The keys, unit queries `(B, Hkv, H / Hkv * Sq, D)`, and pairs that were found, bool `(B, H, Sq, Sk)`."""
        check_shapes(queries, keys)
        projections = self._projections(keys, state_of(self, sparse_meta_data, "projections"), layer)
        known = state_of(self, sparse_meta_data, "magic_pig") if self.config.cache_keys else {}
        hashed = known[layer] = self._hash(keys, projections, known.get(layer))
        lifted = lift_queries(queries, hashed.frame)
        found = self.tables.found(self.tables.hash(lifted, projections), hashed.codes, self.config.min_tables)
        # The last coordinate of a lifted query is 0.
        return hashed, grouped(lifted[..., :-1], keys.shape[1]), found

    def _projections(self, keys: Tensor, known: dict[int, Tensor], layer: int) -> Tensor:
        """Hyperplanes `(D + 1, L * K)`; those that are already there are used as they are."""
        shape = keys.shape[3] + 1, self.tables.number * self.tables.bits
        if layer not in known:
            generator = torch.Generator().manual_seed(self.config.seed + layer)
            known[layer] = torch.randn(shape, generator=generator).to(keys.device)
        if known[layer].shape != shape:
            raise ValueError(
                f"sparse_meta_data['projections'][{layer}] has shape {list(known[layer].shape)}; valid: {list(shape)}"
            )
        return known[layer]

    def _hash(self, keys: Tensor, projections: Tensor, known: _Hashed | None) -> _Hashed:
        """The keys in codes; those that are known are not hashed again."""
        num_known = 0
        if known is not None:
            num_known = known.codes.shape[-1]
            check_grown(keys, known.lengths.shape[:2], num_known)
            if keys.shape[2] == num_known:
                return known
        frame = frame_of(keys, center=self.config.center) if known is None else known.frame
        lifted, lengths = lift_keys(keys[:, :, num_known:], frame)
        codes = self.tables.hash(lifted, projections)
        if known is not None:
            codes, lengths = torch.cat([known.codes, codes], -1), torch.cat([known.lengths, lengths], -1)
        return _Hashed(frame, codes, lengths)
