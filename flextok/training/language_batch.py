"""Batches of examples for a language model: padded, and with several wordings side by side, kept apart by a mask."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flextok.fusion.attention import FusionMask
from flextok.fusion.batch import left_padded
from flextok.fusion.packing import PackedPrompt, pack_segments
from flextok.seeding import mixed_seed
from flextok.training.language_data import Example

IGNORED = -100


class LanguageBatch(NamedTuple):
    """Rows to read, and what is to be predicted from each token."""

    input_ids: Tensor
    """int64 `[batch, length]`, padding first."""
    position_ids: Tensor
    """int64 `[batch, length]`."""
    labels: Tensor
    """int64 `[batch, length]`: the next token, `IGNORED` where there is none to predict."""
    mask: Tensor | None
    """bool `[batch, 1, length, length]`; None where all rows are causal and full."""


def examples_of_step(
    examples: Sequence[Example], step: int, *, batch_size: int, wordings: int, word_dropout: float, seed: int
) -> list[Example]:
    """The examples of a step, each in its own wording, or with others of its question drawn beside it.

    Every example comes once in an epoch, in an order of that epoch. In half of the steps all are alone, in the others
    there are 2 to `wordings` of each: examples of one step are about equally long, and little of it is padding. Of
    wordings that are not alone a share of `word_dropout` of the tokens is left out, never the first.
    """
    rng = torch.Generator().manual_seed(mixed_seed(seed, "wordings", step))
    num_others = 0
    if wordings > 1 and torch.rand((), generator=rng) < 0.5:
        num_others = int(torch.randint(1, wordings, (), generator=rng))
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(place, len(examples))
        if epoch not in orders:
            shuffled = torch.Generator().manual_seed(mixed_seed(seed, "epoch", epoch))
            orders[epoch] = torch.randperm(len(examples), generator=shuffled).tolist()
        (own, *others), ending = examples[orders[epoch][position]]
        drawn = torch.randperm(len(others), generator=rng)[:num_others].tolist()
        shown = [own, *(others[i] for i in drawn)]
        if len(shown) > 1 and word_dropout > 0:
            shown = [_thinned(wording, word_dropout, rng) for wording in shown]
        chosen.append(Example(shown, ending))
    return chosen


def _thinned(ids: list[int], share: float, rng: torch.Generator) -> list[int]:
    stays = torch.rand(len(ids), generator=rng) >= share
    stays[0] = True
    return [token for token, one in zip(ids, stays.tolist(), strict=True) if one]


def make_batch(examples: Sequence[Example], *, pad_token_id: int, device: torch.device) -> LanguageBatch:
    """Wordings of an example see themselves alone, and start at position 0; its ending sees all of them."""
    prompts, labels = zip(*map(_packed, examples), strict=True)
    batch = left_padded(prompts, pad_token_id=pad_token_id, device=device)
    padded = torch.full_like(batch.input_ids, IGNORED, device="cpu")
    for row, values in zip(padded, labels, strict=True):
        row[-len(values) :] = values
    plain = bool(batch.valid.all()) and all(len(prompt.spans) == 1 for prompt in prompts)
    mask = None if plain else FusionMask(batch, 1).dense(batch.length, batch.length)
    return LanguageBatch(batch.input_ids, batch.position_ids, padded.to(device), mask)


def _packed(example: Example) -> tuple[PackedPrompt, Tensor]:
    """What is read, without the last token, and the labels `[length]`."""
    wordings, ending = example
    ids = [token for part in (*wordings, ending) for token in part]
    labels = torch.tensor(ids[1:])
    if len(wordings) == 1:
        return pack_segments([ids[:-1]]), labels
    prompt = pack_segments(wordings, tail=ending[:-1])
    # The last token of a wording has no next one: the ending follows all of them.
    for _, end in prompt.spans:
        labels[end - 1] = IGNORED
    return prompt, labels
