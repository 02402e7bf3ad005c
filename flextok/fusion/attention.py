"""Attention of a Hugging Face causal LM under the mask of packed prompts, without changing the model.

Our attention is registered beside those of transformers under a name of its own. A model runs it for the duration of a
`with` block and is handed the mask as an argument of its call, which reaches every layer untouched: transformers
neither makes a mask of its own nor converts ours, and a layer that gets none is an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flextok.attention.block_masks import block_mask_of
from flextok.attention.engine import AttentionRequest, Backend, plan_attention
from flextok.attention.masks.compose import and_masks
from flextok.attention.masks.mask_mod import MaskMod
from flextok.attention.masks.positions import position_window_mask
from flextok.attention.masks.segments import GapKeys, segment_fusion
from flextok.attention.plan import AttentionPlan
from flextok.attention.reference import ScoreMod
from flextok.attention.segment_blocks import segment_block_mask
from flextok.chosen_attention import check_plain, chosen_attention
from flextok.fusion.batch import PromptBatch

NAME = "flextok_fusion"
"""What the attention is called in `model.config._attn_implementation`."""

FusionBackend = Literal["auto", "sdpa", "flex", "eager"]
"""`auto` is FlexAttention on CUDA and SDPA elsewhere; `eager` computes every score, as a check."""


class FusionMask:
    """Who sees whom in a batch of packed prompts and in what is generated after them.

    A plan is made once per pass of the model and shared by its layers.
    """

    def __init__(
        self,
        batch: PromptBatch,
        max_new_tokens: int,
        *,
        gap_keys: GapKeys = "visible",
        backend: FusionBackend | None = None,
    ) -> None:
        """ValueError for an unknown `gap_keys` or `backend`."""
        self.batch = batch
        self.max_new_tokens = max_new_tokens
        self.gap_keys: GapKeys = gap_keys
        self.backend = _known_backend(backend or "auto")
        self._mask_mod = segment_fusion(
            batch.segment_ids, batch.fusion_start, adjacency=batch.adjacency, gap_keys=gap_keys, valid=batch.valid
        )
        generated = batch.next_position[:, None] + torch.arange(max_new_tokens, device=batch.next_position.device)
        self._positions = torch.cat([batch.position_ids, generated], dim=1)
        self._last_position = int(self._positions.max())
        # Queries after the prompt see all keys, unless one of these is so.
        self._some_keys_differ = (
            batch.log_weights is not None
            or not bool(batch.valid.all())
            or (gap_keys == "hidden" and bool((batch.segment_ids < 0).any()))
        )
        self._plans: dict[tuple[Any, ...], AttentionPlan] = {}

    def select(self, rows: Tensor) -> "FusionMask":
        """The mask of the batch that consists of these rows, int64 `[rows]`."""
        return type(self)(self.batch.select(rows), self.max_new_tokens, gap_keys=self.gap_keys, backend=self.backend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, window: int | None, layer: int) -> Tensor:
        """Attention of the last tokens so far, q `[batch, heads, queries, head_dim]`, over all of them.

        `window` limits how many positions back a query sees; `layer` is the number of the layer that asks.
        """
        if window is not None and window > self._last_position:
            window = None
        key = q.shape[2], k.shape[2], window, q.device, q.dtype
        if key not in self._plans:
            # Those of the pass before are of no use any more.
            self._plans = {known: plan for known, plan in self._plans.items() if known[:2] == key[:2]}
            self._plans[key] = self._plan(*key)
        return self._plans[key].attend(q, k, v, scale)

    def dense(self, queries: int, keys: int, window: int | None = None) -> Tensor:
        """bool `[batch, 1, queries, keys]` for the last of `keys` tokens."""
        device = self.batch.valid.device
        rows = torch.arange(len(self.batch.valid), device=device)[:, None, None, None]
        key = torch.arange(keys, device=device)
        return self._mask_within(window)(rows, torch.zeros_like(rows), key[keys - queries :, None], key)

    def _mask_within(self, window: int | None) -> MaskMod:
        if window is None:
            return self._mask_mod
        return and_masks(self._mask_mod, position_window_mask(self._positions, window))

    def _plan(
        self, queries: int, keys: int, window: int | None, device: torch.device, dtype: torch.dtype
    ) -> AttentionPlan:
        backend: Backend = "reference" if self.backend == "eager" else "sdpa"
        if self.backend == "flex" or (self.backend == "auto" and device.type == "cuda"):
            # One query has no blocks to leave out.
            backend = "flex" if queries == keys else "sdpa"
        mask: Any = None
        if backend == "flex":
            mask = self._block_mask(keys, window).to(device)
        elif queries > 1 or self._some_keys_differ or window is not None:
            mask = self.dense(queries, keys, window)
            if self.batch.log_weights is not None:
                mask = torch.where(mask, self._bias(queries, keys), float("-inf"))
            mask = mask.to(device)
        scores = self._score_mod(keys, device) if backend == "flex" else None
        return plan_attention(AttentionRequest(mask, queries, keys, device, dtype, False, scores), backend)

    def _block_mask(self, length: int, window: int | None) -> Any:
        batch, num_new = self.batch, length - self.batch.length
        if window is not None:
            mask_mod = self._mask_within(window)
            return block_mask_of(mask_mod, length, length, batch.valid.device, batch=len(batch.valid))
        return segment_block_mask(
            F.pad(batch.segment_ids, (0, num_new), value=-1),
            batch.fusion_start,
            adjacency=batch.adjacency,
            gap_keys=self.gap_keys,
            valid=F.pad(batch.valid, (0, num_new), value=True),
        )

    def _bias(self, queries: int, keys: int) -> Tensor:
        """float32 `[batch, 1, queries, keys]`: log-weights of the keys where a query sees all wordings."""
        assert self.batch.log_weights is not None
        query = torch.arange(keys - queries, keys, device=self.batch.valid.device)
        is_joined = (query >= self.batch.fusion_start[:, None])[:, None, :, None]
        of_keys = F.pad(self.batch.log_weights, (0, keys - self.batch.length))[:, None, None, :]
        return torch.where(is_joined, of_keys, 0.0)

    def _score_mod(self, keys: int, device: torch.device) -> ScoreMod | None:
        if self.batch.log_weights is None:
            return None
        of_keys = F.pad(self.batch.log_weights, (0, keys - self.batch.length)).to(device)
        start = self.batch.fusion_start.to(device)

        def weighted(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + torch.where(q_idx >= start[b], of_keys[b, kv_idx], 0.0)

        return weighted


@contextmanager
def fusion_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend as the `fusion_mask` of its call says; afterwards, and after an error, as before.

    Raises:
        ValueError: for a model whose attention cannot be chosen, or is more than a mask over all earlier tokens.
    """
    _check_support(model)
    with chosen_attention(model, NAME):
        yield


def _check_support(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    unknown = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has layers of type {', '.join(sorted(unknown))}; valid: full_attention and "
            "sliding_attention"
        )


def _known_backend(name: str) -> FusionBackend:
    for known in get_args(FusionBackend):
        if name == known:
            return known
    raise ValueError(f"backend={name!r} is unknown; valid: {', '.join(get_args(FusionBackend))}")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    fusion_mask: FusionMask | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: q `[batch, heads, queries, head_dim]`, k and v with fewer heads."""
    layer = getattr(module, "layer_idx", None)
    if fusion_mask is None or attention_mask is not None or layer is None:
        raise ValueError(f"attention {NAME!r} needs fusion_mask=..., and no other mask, in every call of the model")
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    is_hidden = layer_types and layer_types[layer] == "sliding_attention" and sliding_window is None
    check_plain(module, NAME, others, dropout, ["a sliding window in the mask only"] if is_hidden else [])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = fusion_mask.attend(query, key, value, scale, window=sliding_window, layer=layer)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers makes no mask: ours comes with the call."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
