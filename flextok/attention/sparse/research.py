"""`ResearchAttention`: a list of maskers, run one after another, and the attention under what they select."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flextok.attention.sparse.attention import masked_attention
from flextok.attention.sparse.config import Given, MaskerConfig, Number
from flextok.attention.sparse.gathered import gathered_attention
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import ResearchMasker, SamplingMasker, all_columns
from flextok.attention.sparse.scores import check_shapes
from flextok.attention.sparse.selection import Selection, nothing_selected

logger = logging.getLogger(__name__)


@dataclass
class ResearchAttentionConfig:
    """The configurations of maskers, in the order in which they are applied; none means dense attention."""

    masker_configs: Given[Sequence[MaskerConfig]] = field(default_factory=list)


class ResearchAttention:
    """Maskers in their order. The usual one is sink, local, heavy hitters, sampler."""

    def __init__(self, maskers: Sequence[ResearchMasker]) -> None:
        """ValueError if more than one masker draws at random, or two of a kind keep what they know of keys.

        Probabilities of a union of draws could not be known; and what is known of keys is stored by kind and layer.
        """
        check_one_sampler([type(masker) for masker in maskers])
        caching = [type(masker).__name__ for masker in maskers if getattr(masker.config, "cache_keys", False)]
        twice = {name for name in caching if caching.count(name) > 1}
        if twice:
            raise ValueError(f"masker_configs holds several {twice.pop()} with cache_keys; valid: one, or without it")
        self.maskers = tuple(maskers)

    @classmethod
    def create_from_config(cls, config: Any) -> "ResearchAttention":
        """The maskers of a configuration; TypeError if it is of another type, ValueError for what is wrong in it."""
        if not isinstance(config, ResearchAttentionConfig):
            raise TypeError(f"config is a {type(config).__name__}; valid: a ResearchAttentionConfig")
        for place, masker_config in enumerate(config.masker_configs):
            if not isinstance(masker_config, MaskerConfig):
                raise ValueError(f"masker_configs[{place}]={masker_config!r}; valid: a MaskerConfig")
        _warn_of_offsets(config.masker_configs)
        return cls([ResearchMasker.create_masker_from_config(each) for each in config.masker_configs])

    @torch.no_grad()
    def build_mask(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        dropout: Number,
        sparse_meta_data: dict[Any, Any] | None,
        **kwargs: Any,
    ) -> Mask:
        """What the maskers select, `(B, H, Sq, Sk)`; full without maskers. Arguments: `ResearchMasker.add_mask`."""
        check_shapes(queries, keys, values)
        shape = (*queries.shape[:3], keys.shape[2])
        if not self.maskers:
            return Mask.create_full_mask(shape, torch.float32, queries.device)
        mask = Mask.create_empty_mask(shape, torch.float32, queries.device)
        for masker in self.maskers:
            mask = masker.add_mask(
                keys=keys,
                queries=queries,
                values=values,
                attention_mask=attention_mask,
                scaling=scaling,
                dropout=dropout,
                sparse_meta_data=sparse_meta_data,
                previous_mask=mask,
                **kwargs,
            )
        return mask

    def custom_attention(
        self,
        module: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        dropout: Number,
        sparse_meta_data: dict[Any, Any] | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention from all logits: output `(B, Sq, H, Dv)` and weights `(B, H, Sq, Sk)`, as `masked_attention`.

        `module`, if it is not None, says by `training` whether dropout acts, and by `layer_idx` which layer it is where
        the arguments do not.
        """
        if hasattr(module, "layer_idx"):
            kwargs = {"layer_idx": module.layer_idx} | kwargs
        mask = self.build_mask(queries, keys, values, attention_mask, scaling, dropout, sparse_meta_data, **kwargs)
        training = bool(getattr(module, "training", False))
        return masked_attention(queries, keys, values, mask, scaling, attention_mask, dropout, training)

    def select(
        self,
        queries: Tensor,
        keys: Tensor,
        attention_mask: Tensor | None,
        sparse_meta_data: dict[Any, Any] | None,
        **kwargs: Any,
    ) -> Selection:
        """The same choice as `build_mask` by lists of columns, without logits or anything of `(Sq, Sk)`.

        Raises:
            ValueError: a masker of the list chooses by all logits.
        """
        check_shapes(queries, keys)
        selection = nothing_selected(queries) if self.maskers else all_columns(queries, keys)
        for masker in self.maskers:
            selection = masker.select(
                keys=keys,
                queries=queries,
                attention_mask=attention_mask,
                sparse_meta_data=sparse_meta_data,
                previous=selection,
                **kwargs,
            )
        return selection

    def gathered_attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        sparse_meta_data: dict[Any, Any] | None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention that reads the selected keys and values alone, `(B, Sq, H, Dv)`: for decoding, where Sq is 1.

        Raises:
            ValueError: a masker of the list chooses by all logits.
        """
        selection = self.select(queries, keys, attention_mask, sparse_meta_data, **kwargs)
        return gathered_attention(queries, keys, values, selection, scaling, attention_mask)


def check_one_sampler(masker_classes: Sequence[type[ResearchMasker]]) -> None:
    """ValueError if more than one of them draws at random."""
    samplers = [kind.__name__ for kind in masker_classes if issubclass(kind, SamplingMasker)]
    if len(samplers) > 1:
        raise ValueError(f"masker_configs holds {len(samplers)} samplers, {', '.join(samplers)}; valid: one at most")


def _warn_of_offsets(configs: Sequence[MaskerConfig]) -> None:
    """A sampler that leaves out keys which no other masker holds gives biased results."""
    sizes = {name: 0 for name in ("sink_size", "window_size")}
    for config in configs:
        sizes |= {name: getattr(config, name) for name in sizes if hasattr(config, name)}
        for offset, size in (("init_offset", "sink_size"), ("local_offset", "window_size")):
            given = getattr(config, offset, sizes[size])
            if given != sizes[size]:
                logger.warning(
                    "%s: %s=%s, but the maskers before it have %s=%s: keys between the two bias the result",
                    *(type(config).__name__, offset, given, size, sizes[size]),
                )
