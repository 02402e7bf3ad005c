"""Queries and keys of a model's own attention, for hash projections to learn from."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flextok.attention.layout import SequenceLayout
from flextok.attention.plan import AttentionPlan
from flextok.model.layers.attention import FlexAttention, FlexSelfAttention
from flextok.model.trunks.transformers import trunk_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class LayerQueries:
    """Of one layer, sequence by sequence."""

    queries: list[Tensor] = field(default_factory=list)
    """Each float32 `[heads, tokens, head_dim]`."""
    keys: list[Tensor] = field(default_factory=list)
    """Each `[kv_heads, tokens, head_dim]`."""
    allowed: list[Tensor | None] = field(default_factory=list)
    """Each bool `[tokens, tokens]`, or None where every token sees every other."""

    def add(self, queries: Tensor, keys: Tensor, allowed: Tensor | None) -> None:
        self.queries.append(queries.detach().float().cpu())
        self.keys.append(keys.detach().float().cpu())
        self.allowed.append(None if allowed is None else allowed.cpu())


Observed = dict[int, LayerQueries]
"""By number of the layer; all hold the same number of sequences."""


def num_sequences(observed: Observed) -> int:
    """How many there are, of each layer."""
    return len(next(iter(observed.values())).queries)


def data_sha256(observed: Observed) -> str:
    """Of all queries and keys."""
    digest = hashlib.sha256()
    for layer in sorted(observed):
        for tensor in (*observed[layer].queries, *observed[layer].keys):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def observe_language_model(model: "PreTrainedModel", ids: Tensor, *, context: int, windows: int) -> Observed:
    """From windows of a text, spread over all of it; the model's results are what they are without.

    Args:
        ids: int64 `[tokens]`.
        context: tokens of a window.
        windows: so many, or all there are.

    Raises:
        ValueError: there are fewer than 2 windows; a model that `sparse_attention` does not take.
    """
    from flextok.sparse_lm.handler import AttentionHandler, Rows, handled_attention
    from flextok.sparse_lm.prefill import causal_prefill

    class Observer(AttentionHandler):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scaling: float, _: Any) -> Tensor:
            allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
            observed.setdefault(layer, LayerQueries()).add(q[0], k[0], allowed)
            return causal_prefill(q, k, v, (), scaling)

    observed: Observed = {}
    starts = range(0, len(ids) - context + 1, context)
    if min(windows, len(starts)) < 2:
        raise ValueError(f"{len(ids)} tokens are {len(starts)} windows of {context}; valid: 2 windows or more")
    chosen = [starts[place * len(starts) // windows] for place in range(windows)] if len(starts) > windows else starts
    with handled_attention(model, Observer()):
        for start in chosen:
            model(ids[None, start : start + context].to(model.device), use_cache=False)
    return observed


@contextmanager
def observed_trunk(part: nn.Module) -> Iterator[Observed]:
    """Yield what collects queries and keys of self-attention in the trunks inside `part`, image by image.

    The rows must hold one image each. Results stay what they are: queries and keys are computed a second time.
    """
    observed: Observed = {}
    blocks = list(trunk_blocks(part))
    modules = [next(m for m in block.modules() if isinstance(m, FlexSelfAttention)) for block in blocks]
    hooks = []

    def hook_of(layer: int) -> Any:
        def observe(module: FlexAttention, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
            named = dict(zip(("x", "score_mod", "block_mask", "rope_forward", "keep"), args, strict=False)) | kwargs
            with torch.no_grad():
                q, k = _queries_and_keys(module, named["x"], named.get("rope_forward"))
            observed.setdefault(layer, LayerQueries()).add(q[0], k[0], _allowed(named.get("block_mask")))

        return observe

    try:
        for layer, module in enumerate(modules):
            hooks.append(module.register_forward_pre_hook(hook_of(layer), with_kwargs=True))
        yield observed
    finally:
        for hook in hooks:
            hook.remove()


def _queries_and_keys(module: FlexAttention, x: Tensor, rope_forward: Any) -> tuple[Tensor, Tensor]:
    q, k, v = (linear(x).unflatten(-1, (module.num_heads, -1)) for linear in (module.wq, module.wk, module.wv))
    q, k, v = module.q_norm(q).transpose(1, 2), module.k_norm(k).transpose(1, 2), v.transpose(1, 2)
    if rope_forward is not None:
        q, k, v = rope_forward(q, k, v)
    return q, k


def _allowed(mask: Any) -> Tensor | None:
    """Who sees whom in a row of one image."""
    layout = mask.layout if isinstance(mask, AttentionPlan) else mask
    if layout is None:
        return None
    if not isinstance(layout, SequenceLayout) or len(layout.lengths) != 1:
        raise ValueError("hash projections learn from rows of one image each, under a layout")
    is_open = layout.mode == "full" and layout.keep_last is None and layout.total is None
    return None if is_open else layout.dense_mask()
