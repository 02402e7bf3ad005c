"""What a masker is: a rule that adds keys to what queries may attend to.

A new one is a file with a configuration and a class:

    @dataclass
    class EveryNthMaskerConfig(FixedMaskerConfig):
        step: int

    @MaskerRegistry.register(EveryNthMaskerConfig)
    class EveryNthMasker(FixedMasker):
        def add_mask(self, *, keys, queries, previous_mask, **kwargs): ...
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flextok.attention.sparse.config import MaskerConfig, Number
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.scores import allowed_pairs, check_shapes
from flextok.attention.sparse.selection import Selection, merge_selections, nothing_selected


class AttentionTensorDimensions(NamedTuple):
    """Sizes of a call of attention, for authors of maskers."""

    batch_size: int
    num_heads: int
    """Of queries."""
    seq_len_queries: int
    seq_len_keys: int


class ResearchMasker(ABC):
    """A rule of selection. Subclasses register a configuration and implement `add_mask`, and `_select` where they can.

    What `add_mask` has to hold: a full `previous_mask` is returned at once; no value falls; inputs stay unchanged.
    """

    def __init__(self, config: MaskerConfig) -> None:
        self.config = config

    @abstractmethod
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
        """`previous_mask` and the keys that this rule selects; called by keyword.

        Args:
            keys: `(B, Hkv, Sk, D)`; values `(B, Hkv, Sk, Dv)`.
            queries: `(B, H, Sq, D)`, the last Sq positions of the keys.
            attention_mask: None, bool (True attends) or additive, broadcastable to `(B, H, Sq, >= Sk)`.
            scaling: factor of `q . k`.
            dropout: probability of attention dropout.
            sparse_meta_data: the caller's dictionary of one sequence, in which maskers keep state by layer.
            previous_mask: `(B, H, Sq, Sk)`.
            kwargs: `layer_idx` (int) and `generator` (`torch.Generator`); others are ignored.
        """

    @torch.no_grad()
    def select(
        self,
        keys: Tensor,
        queries: Tensor,
        attention_mask: Tensor | None = None,
        sparse_meta_data: dict[Any, Any] | None = None,
        previous: Selection | None = None,
        **kwargs: Any,
    ) -> Selection:
        """The same as `add_mask` by lists of columns, for rules that need no logits: nothing of (Sq, Sk) is stored.

        Args:
            previous: what earlier maskers chose; None for nothing.

        Raises:
            ValueError: this rule cannot.
        """
        check_shapes(queries, keys)
        num_keys = keys.shape[2]
        if previous is None:
            previous = nothing_selected(queries)
        if previous.is_everything(num_keys):
            return previous
        chosen = self._select(keys, queries, attention_mask, sparse_meta_data, previous, **kwargs)
        return chosen if chosen.is_everything(num_keys) else merge_selections(previous, chosen)

    def _select(
        self,
        keys: Tensor,
        queries: Tensor,
        attention_mask: Tensor | None,
        sparse_meta_data: dict[Any, Any] | None,
        previous: Selection,
        **kwargs: Any,
    ) -> Selection:
        """What this rule adds to `previous`, or all of what it chooses."""
        raise ValueError(f"{type(self).__name__} needs all scores, it cannot select; use `build_mask`")

    @classmethod
    def create_from_config(cls, config: Any) -> "ResearchMasker":
        """A masker of this class; ValueError if its configuration is of another type."""
        expected = [kind for kind, owner in MaskerRegistry.get_all_registered_types().items() if owner is cls]
        if type(config) not in expected:
            names = ", ".join(kind.__name__ for kind in expected) or "none, the class is not registered"
            raise ValueError(f"{cls.__name__} got a {type(config).__name__}; valid: {names}")
        return cls(config)

    @staticmethod
    def create_masker_from_config(config: Any) -> "ResearchMasker":
        """The masker that is registered for the type of `config`."""
        return MaskerRegistry.get_masker_class(type(config)).create_from_config(config)

    @staticmethod
    def _extract_tensor_dimensions(keys: Tensor, queries: Tensor) -> AttentionTensorDimensions:
        check_shapes(queries, keys)
        return AttentionTensorDimensions(queries.shape[0], queries.shape[1], queries.shape[2], keys.shape[2])


class FixedMasker(ResearchMasker):
    """Selects with certainty: what it adds has the value 1."""


class SamplingMasker(ResearchMasker):
    """Draws keys at random, each with the value that is its probability of being drawn."""


def candidates(previous_mask: Mask, attention_mask: Tensor | None) -> Tensor:
    """Pairs that a rule may still choose, bool `(B, H, Sq, Sk)`: inactive and allowed."""
    inactive = previous_mask.get_dense_mask() == 0
    allowed = allowed_pairs(attention_mask, inactive.shape)
    return inactive if allowed is None else inactive & allowed


def with_chosen(previous_mask: Mask, chosen: Tensor) -> Mask:
    """`previous_mask` with the value 1 where `chosen`, bool `(B, H, Sq, Sk)`."""
    added = Mask.create_mask_from_dense_mask(previous_mask.shape, chosen, previous_mask.dtype, validate=False)
    return previous_mask.merge_mask(added)


def full_like(previous_mask: Mask) -> Mask:
    """The full mask of the same shape."""
    return Mask.create_full_mask(previous_mask.shape, previous_mask.dtype, previous_mask.device)


def layer_of(masker: ResearchMasker, kwargs: dict[str, Any]) -> int:
    """`layer_idx` of a call; ValueError where it is missing."""
    layer = kwargs.get("layer_idx")
    if layer is None:
        raise ValueError(f"{type(masker).__name__} keeps something per layer: give it layer_idx, an int")
    return int(layer)


def state_of(masker: ResearchMasker, sparse_meta_data: dict[Any, Any] | None, name: str) -> dict[int, Any]:
    """What maskers keep under `name` in the caller's dictionary, by layer."""
    if not isinstance(sparse_meta_data, dict):
        raise ValueError(
            f"{type(masker).__name__} keeps state in sparse_meta_data={sparse_meta_data!r}; valid: a dictionary, "
            "one per sequence"
        )
    return sparse_meta_data.setdefault(name, {})


def check_grown(keys: Tensor, batch_and_heads: torch.Size, num_known: int) -> None:
    """ValueError unless `keys` can be those of the last call and more."""
    if keys.shape[:2] != batch_and_heads or keys.shape[2] < num_known:
        raise ValueError(
            f"cache_keys: {list(keys.shape[:3])} keys after {[*batch_and_heads, num_known]}; valid: the same batch and "
            "heads, and keys that only grow. Give each sequence its own sparse_meta_data"
        )


def all_columns(queries: Tensor, keys: Tensor) -> Selection:
    """Every key with certainty."""
    batch, heads, num_queries, num_keys = (*queries.shape[:3], keys.shape[2])
    columns = torch.arange(num_keys, device=keys.device).expand(batch, heads, num_queries, num_keys)
    return Selection(columns, torch.ones((), device=keys.device).expand(columns.shape))
