"""Answers read off several wordings of a question at once.

The prompt is read in one pass under the mask of its wordings; after that one token at a time is added. What was read
never changes, since no token of the prompt sees a later one, so keys and values are kept and nothing is read twice.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from flextok.attention.masks.segments import GapKeys
from flextok.fusion.attention import FusionBackend, FusionMask, fusion_attention
from flextok.fusion.batch import left_padded
from flextok.fusion.decoding import Rows, Stopping, Streamer
from flextok.fusion.packing import PackedPrompt
from flextok.fusion.strategies import Greedy, Strategy


@dataclass(frozen=True)
class FusionOutput:
    """What was generated, one row per prompt, or per sample of each."""

    sequences: Tensor
    """int64 `[batch, steps]`: new tokens only, padded after the one that ended the row."""
    lengths: Tensor
    """int64 `[batch]`: new tokens of each row, the one that ended it included."""
    prefill_logits: list[Tensor] | None = None
    """Per prompt `[length, vocabulary]`."""
    step_logits: Tensor | None = None
    """`[batch, steps, vocabulary]`: what each token was chosen from."""

    def token_lists(self) -> list[list[int]]:
        """The new tokens of each row without padding."""
        return [row[:length] for row, length in zip(self.sequences.tolist(), self.lengths.tolist(), strict=True)]


@torch.no_grad()
def generate_fused(
    model: PreTrainedModel,
    prompts: Sequence[PackedPrompt],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    pad_token_id: int = 0,
    use_cache: bool = True,
    gap_keys: GapKeys = "visible",
    return_logits: bool = False,
    backend: FusionBackend | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    strategy: Strategy | None = None,
    streamer: Streamer | None = None,
) -> FusionOutput:
    """Continue packed prompts, of any lengths and numbers of wordings, each as if it were alone.

    Args:
        model: a causal LM that takes its attention from transformers' `AttentionInterface`, on any device and of any
            dtype.
        eos_token_ids: a row ends with any of these.
        use_cache: False reads everything again for every token: slow, as a check.
        gap_keys: `hidden` keeps separators from what is generated.
        return_logits: also return the logits of prompts and steps.
        backend: None chooses; see `FusionBackend`.
        weights: per prompt, how much each of its wordings counts; 2 is as if it were there twice.
        strategy: None is greedy; `Sampling` and `Beams` are the others.
        streamer: receives the tokens of every step, `[batch]`, such as a `TextStreamer` of transformers.

    Raises:
        ValueError: no prompt, a position beyond the model's context, a number that is not one, and models whose
            attention cannot be replaced (see `fusion_attention`).
    """
    stopping = Stopping(max_new_tokens, eos_token_ids, pad_token_id)
    rows = FusedRows(
        model,
        prompts,
        stopping,
        use_cache=use_cache,
        gap_keys=gap_keys,
        keep_logits=return_logits,
        backend=backend,
        weights=weights,
    )
    ids = [prompt.input_ids.tolist() for prompt in prompts]
    with fusion_attention(model):
        decoded = (strategy or Greedy()).run(
            rows, rows.start(), ids, stopping, keep_scores=return_logits, streamer=streamer
        )
    return FusionOutput(decoded.sequences, decoded.lengths, rows.prefill_logits, decoded.step_scores)


class FusedRows(Rows):
    """Packed prompts being continued by a model; to be used within `fusion_attention`."""

    prefill_logits: list[Tensor] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[PackedPrompt],
        stopping: Stopping,
        *,
        use_cache: bool = True,
        gap_keys: GapKeys = "visible",
        keep_logits: bool = False,
        backend: FusionBackend | None = None,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> None:
        _check_context(model, prompts, stopping.max_new_tokens)
        batch = left_padded(prompts, pad_token_id=stopping.pad_token_id, device=model.device, weights=weights)
        self._model = model
        self._mask = FusionMask(batch, stopping.max_new_tokens, gap_keys=gap_keys, backend=backend)
        # Without the model's config: layers with a window would drop keys by their place, not by their position.
        self._cache = DynamicCache() if use_cache else None
        self._tokens, self._positions = batch.input_ids, batch.position_ids
        self._next_position = batch.next_position
        self._keep_logits = keep_logits

    def start(self) -> Tensor:
        logits = self._forward(self._tokens, self._positions, 0 if self._keep_logits else 1)
        if self._keep_logits:
            self.prefill_logits = [
                row[row_valid] for row, row_valid in zip(logits, self._mask.batch.valid, strict=True)
            ]
        return logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        new = tokens[:, None], self._next_position[:, None]
        self._next_position = self._next_position + 1
        if self._cache is None:
            self._tokens, self._positions = (
                torch.cat([self._tokens, new[0]], 1),
                torch.cat([self._positions, new[1]], 1),
            )
            new = self._tokens, self._positions
        return self._forward(*new, 1)[:, -1]

    def select(self, index: Tensor) -> None:
        self._mask = self._mask.select(index)
        self._tokens, self._positions = self._tokens[index], self._positions[index]
        self._next_position = self._next_position[index]
        if self._cache is not None:
            self._cache.batch_select_indices(index)

    def _forward(self, tokens: Tensor, positions: Tensor, logits_to_keep: int) -> Tensor:
        output: Any = self._model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=self._cache is not None,
            logits_to_keep=logits_to_keep,
            fusion_mask=self._mask,
        )
        logits: Tensor = output.logits
        return logits


def _check_context(model: PreTrainedModel, prompts: Sequence[PackedPrompt], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        last = max(int(prompt.position_ids.max()) + 1, prompt.next_position + max_new_tokens)
        if limit is not None and last > limit:
            raise ValueError(
                f"prompts[{number}] and max_new_tokens={max_new_tokens} reach position {last}; valid: up to {limit}, "
                "the context of the model"
            )
