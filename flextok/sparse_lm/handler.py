"""Give a model of transformers another attention for the duration of a `with` block, without changing the model.

One attention of ours is registered beside those of transformers. It does what the handler of the block says, which a
hook adds to the arguments of every call of the model; transformers hands it down to every layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from flextok.chosen_attention import check_plain, chosen_attention

NAME = "flextok_sparse"
"""What the attention is called in `model.config._attn_implementation`."""


class Rows:
    """Which keys the rows of a batch may see in one call of the model; the attention mask as transformers states it."""

    def __init__(self, mask: Tensor | None, batch: int, num_queries: int, num_keys: int, device: torch.device) -> None:
        """`mask`: None or bool `[batch, 1, 1, keys]` for order in time and padding alone, else `[.., queries, keys]`.

        Raises:
            ValueError: the last key is padding.
        """
        self.num_queries, self.num_keys, self.device = num_queries, num_keys, device
        # One row of bool for many queries, or for one, is padding alone.
        is_dense = mask is not None and (mask.shape[2] == num_queries > 1 or mask.dtype != torch.bool)
        self._dense = mask if is_dense else None
        self.padding = [0] * batch
        """Of each row, how many columns on its left are none of its tokens."""
        if mask is None:
            return
        is_seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(2).any(1)
        is_seen = is_seen[:, :num_keys].expand(batch, -1)
        first = is_seen.int().argmax(-1)
        if not bool(is_seen[:, -1].all()):
            raise ValueError(
                "the attention mask hides the newest token of a row; valid: batches padded on the left, and caches "
                "that grow (tokenizer.padding_side='left', no cache_implementation='static')"
            )
        self.padding = first.tolist()
        columns = torch.arange(num_keys, device=is_seen.device)
        if self._dense is None and not bool((is_seen | (columns < first[:, None])).all()):
            # Padding between tokens: the mask is needed in full.
            self._dense = causal(num_queries, num_keys, device) & is_seen[:, None, None, :]

    @property
    def in_order(self) -> bool:
        """Whether the only rule beside padding on the left is that no query sees a later key."""
        return self._dense is None

    def mask_of(self, row: int) -> Tensor | None:
        """`[1, 1, queries, keys]` of the tokens of a row, bool or to be added; None where everything may be seen."""
        start = self.padding[row]
        num_queries, num_keys = min(self.num_queries, self.num_keys - start), self.num_keys - start
        if self._dense is not None:
            mine = self._dense[row if len(self._dense) > 1 else 0][None]
            return mine[:, :, -num_queries:, start : self.num_keys]
        return None if num_queries == 1 else causal(num_queries, num_keys, self.device)


def causal(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """bool `[1, 1, queries, keys]`: the queries are the last of the keys and see none that is later."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)[None, None]


class AttentionHandler(ABC):
    """What is done in place of a model's attention."""

    _rows: tuple[Tensor | None, Rows] | None = None

    def begin_pass(self) -> None:
        """A call of the model begins."""
        self._rows = None

    def rows(self, mask: Tensor | None, q: Tensor, k: Tensor) -> Rows:
        """Made once for all layers."""
        if self._rows is None or self._rows[0] is not mask or self._rows[1].num_keys != k.shape[2]:
            self._rows = mask, Rows(mask, len(q), q.shape[2], k.shape[2], q.device)
        return self._rows[1]

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scaling: float, meta_data: Any) -> Tensor:
        """The output `[batch, queries, heads, head_dim]` of q `[batch, heads, queries, head_dim]`, k and v with all
        keys so far, and perhaps fewer heads. `meta_data`: what the call of the model was given as
        `sparse_meta_data`, or None."""


@contextmanager
def handled_attention(model: PreTrainedModel, handler: AttentionHandler) -> Iterator[None]:
    """Let `handler` do the attention of `model`; afterwards, and after an error, the model is as before.

    Raises:
        ValueError: for a model whose attention cannot be chosen, or is more than a mask over all earlier tokens.
    """
    check_support(model)

    def add_handler(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        handler.begin_pass()
        return args, {**kwargs, "attention_handler": handler}

    hook = model.register_forward_pre_hook(add_handler, with_kwargs=True)
    try:
        with chosen_attention(model, NAME):
            yield
    finally:
        hook.remove()


def check_support(model: PreTrainedModel) -> None:
    """ValueError for a model with layers that see only a window of tokens, or are no attention."""
    config = model.config.get_text_config()
    layer_types = {*(getattr(config, "layer_types", None) or ())}
    windows = layer_types - {"full_attention"}
    if not layer_types and getattr(config, "sliding_window", None) is not None:
        windows = {f"sliding_window={config.sliding_window}"}
    if windows:
        raise ValueError(
            f"{type(model).__name__} has layers of another kind, {', '.join(sorted(windows))}; valid: full_attention "
            "(a window can be switched off in the config of most models: sliding_window=None)"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    attention_handler: AttentionHandler | None = None,
    sparse_meta_data: Any = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: q `[batch, heads, queries, head_dim]`, k and v with fewer heads."""
    layer = getattr(module, "layer_idx", None)
    if attention_handler is None or layer is None:
        raise ValueError(f"attention {NAME!r} works in a `with` block, in calls of the model that the block was given")
    check_plain(module, NAME, others, dropout, [] if sliding_window is None else ["a sliding window"])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = attention_handler.rows(attention_mask, query, key)
    return attention_handler.attend(layer, query, key, value, rows, scaling, sparse_meta_data).contiguous(), None


def _mask(
    *,
    mask_function: Any,
    attention_mask: Tensor | None,
    q_length: int,
    q_offset: int = 0,
    kv_length: int,
    kv_offset: int = 0,
    **others: Any,
) -> Tensor | None:
    """Padding alone where that and order in time is all there is, so that nothing of queries x keys is made."""
    if int(q_offset) + q_length != kv_length + kv_offset or kv_offset:
        raise ValueError(
            f"{kv_length} keys for {int(q_offset) + q_length} tokens; valid: a cache that grows, such as DynamicCache "
            "(no cache_implementation='static')"
        )
    if mask_function is causal_mask_function:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        return None if padding is None else padding[:, None, None, :kv_length].bool()
    lengths = {"q_length": q_length, "q_offset": q_offset, "kv_length": kv_length}
    options = {**others, **lengths, "allow_is_causal_skip": False}
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **options)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
