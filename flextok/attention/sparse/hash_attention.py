"""HashAttention (arXiv 2412.14468): learned signatures of queries and keys; the nearest keys are the heavy hitters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flextok.attention.sparse.config import (
    Given,
    Number,
    TopKMaskerConfig,
    checked_bool,
    checked_choice,
    checked_int,
    num_keys_of,
)
from flextok.attention.sparse.hat_weights import HatWeights, check_hat_weights, load_hat_weights
from flextok.attention.sparse.masker import all_columns, check_grown, layer_of, state_of
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.scores import additive_bias, allowed_pairs, repeat_heads, work_dtype
from flextok.attention.sparse.selection import Selection, columns_of, nothing_selected
from flextok.attention.sparse.signatures import hamming_distance, pack_bits
from flextok.attention.sparse.top_k import TopKMasker, largest, nearest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


@dataclass
class HashAttentionTopKMaskerConfig(TopKMaskerConfig):
    """The `heavy_size` keys whose signatures differ least from the query's."""

    hat_bits: Given[int]
    hat_mlp_layers: Given[int]
    """Matrices of each perceptron."""
    hat_mlp_hidden_size: Given[int]
    hat_mlp_activation: Given[str]
    """relu, silu, gelu or tanh; after all matrices but the last."""
    hat_weights: Given[HatWeights | None] = field(default=None, repr=False, compare=False)
    hat_weight_file: Given[str | None] = None
    """safetensors; `flextok.attention.sparse.hat_weights` has the layout."""
    cache_keys: Given[bool] = False
    """Hash only keys that are new since the last call with the same `sparse_meta_data`. For keys that only grow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hat_bits", "hat_mlp_layers", "hat_mlp_hidden_size"):
            setattr(self, name, checked_int(name, getattr(self, name), 1))
        self.hat_mlp_activation = checked_choice("hat_mlp_activation", self.hat_mlp_activation, tuple(ACTIVATIONS))
        self.cache_keys = checked_bool("cache_keys", self.cache_keys)
        if (self.hat_weights is None) == (self.hat_weight_file is None):
            raise ValueError("hat_weights, hat_weight_file: one of the two is needed, and only one")
        if self.hat_weight_file is not None:
            if not isinstance(self.hat_weight_file, str | PathLike):
                raise ValueError(f"hat_weight_file={self.hat_weight_file!r}; valid: the path of a safetensors file")
            self.hat_weight_file = str(self.hat_weight_file)
        if self.hat_weights is not None:
            self.check_fit("hat_weights", self.hat_weights)

    def check_fit(self, name: str, weights: Any) -> None:
        """ValueError unless `weights` have the number of matrices, the hidden width and the bits that are stated."""
        check_hat_weights(name, weights)
        for layer, parts in weights.items():
            for side in ("query", "key"):
                widths = [matrix.shape[2] for matrix in parts[f"{side}_matrix"]]
                real = [("hat_mlp_layers", len(widths)), ("hat_bits", widths[-1])]
                real += [("hat_mlp_hidden_size", width) for width in widths[:-1]]
                for option, value in real:
                    if getattr(self, option) != value:
                        raise ValueError(f"{option}={getattr(self, option)}, but {name}[{layer}], {side}, has {value}")


@MaskerRegistry.register(HashAttentionTopKMaskerConfig)
class HashAttentionTopKMasker(TopKMasker):
    """Adds the keys with the nearest signatures."""

    config: HashAttentionTopKMaskerConfig

    def __init__(self, config: HashAttentionTopKMaskerConfig) -> None:
        """ValueError if the weights do not fit the options or the file cannot be read."""
        super().__init__(config)
        if config.hat_weights is None:
            assert config.hat_weight_file is not None
            self.weights = load_hat_weights(config.hat_weight_file)
            config.check_fit("hat_weight_file", self.weights)
        else:
            self.weights = config.hat_weights
        self._moved: dict[tuple[int, str, torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}

    def scores(
        self,
        queries: Tensor,
        keys: Tensor,
        attention_mask: Tensor | None,
        scaling: Number,
        sparse_meta_data: dict[Any, Any] | None,
        **kwargs: Any,
    ) -> Tensor:
        distance = self._distance(queries, keys, sparse_meta_data, layer_of(self, kwargs))
        return self._scores_of(distance, attention_mask)

    def _select(
        self,
        keys: Tensor,
        queries: Tensor,
        attention_mask: Tensor | None,
        sparse_meta_data: dict[Any, Any] | None,
        previous: Selection,
        **kwargs: Any,
    ) -> Selection:
        num_keys = keys.shape[2]
        size = num_keys_of(self.config.heavy_size, num_keys)
        if size == 0:
            return nothing_selected(queries)
        if size >= num_keys:
            return all_columns(queries, keys)
        distance = self._distance(queries, keys, sparse_meta_data, layer_of(self, kwargs))
        is_candidate = ~previous.contains(num_keys)
        allowed, bias = allowed_pairs(attention_mask, distance.shape), additive_bias(attention_mask, distance.shape)
        if allowed is not None:
            is_candidate &= allowed
        if bias is None or allowed is None or bool((bias.masked_fill(~allowed, 0) == 0).all()):
            chosen = nearest(distance, size, is_candidate, self.config.hat_bits)
        else:
            chosen = largest(self._scores_of(distance, attention_mask), size, is_candidate)
        columns, is_entry = columns_of(chosen)
        return Selection(columns, is_entry.float())

    def _scores_of(self, distance: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Agreeing less differing bits, plus an additive attention mask."""
        scores = self.config.hat_bits - 2 * distance.float()
        bias = additive_bias(attention_mask, scores.shape)
        return scores if bias is None else scores + bias

    def _distance(self, queries: Tensor, keys: Tensor, sparse_meta_data: dict[Any, Any] | None, layer: int) -> Tensor:
        """In how many bits signatures differ, `(B, H, Sq, Sk)`."""
        if layer not in self.weights:
            raise ValueError(f"layer_idx={layer}: there are no weights for it; valid: {sorted(self.weights)}")
        heads = queries.shape[1]
        known = state_of(self, sparse_meta_data, "hash_attention") if self.config.cache_keys else {}
        signatures = known.get(layer)
        num_known = 0
        if signatures is not None:
            num_known = signatures.shape[-1]
            check_grown(repeat_heads(keys[..., :0], heads), signatures.shape[1:3], num_known)
        if signatures is None or keys.shape[2] > num_known:
            new = self._signatures("key", layer, repeat_heads(keys[:, :, num_known:], heads))
            signatures = new if signatures is None else torch.cat([signatures, new], -1)
        known[layer] = signatures
        return hamming_distance(self._signatures("query", layer, queries), signatures)

    def _signatures(self, side: str, layer: int, x: Tensor) -> Tensor:
        """Packed bits `(words, B, H, S)` of `(B, H, S, D)`."""
        perceptron = self._perceptron(side, layer, x)
        matrix = perceptron[0][0]
        if matrix.shape[:2] != (x.shape[1], x.shape[3]):
            raise ValueError(
                f"hat_weights[{layer}], {side}: made for {matrix.shape[0]} heads of {matrix.shape[1]}, not "
                f"{x.shape[1]} of {x.shape[3]}"
            )
        x = x.to(matrix.dtype)
        for i, (matrix, bias) in enumerate(perceptron):
            x = x @ matrix + bias[:, None]
            if i < len(perceptron) - 1:
                x = ACTIVATIONS[self.config.hat_mlp_activation](x)
        # Zero counts as positive.
        return pack_bits(x >= 0)

    def _perceptron(self, side: str, layer: int, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Matrices and biases in the type and on the device that `x` is computed with, moved once."""
        key = layer, side, x.device, work_dtype(x.dtype)
        if key not in self._moved:
            parts = self.weights[layer]
            pairs = zip(parts[f"{side}_matrix"], parts[f"{side}_bias"], strict=True)
            self._moved[key] = [(matrix.to(*key[2:]), bias.to(*key[2:])) for matrix, bias in pairs]
        return self._moved[key]
