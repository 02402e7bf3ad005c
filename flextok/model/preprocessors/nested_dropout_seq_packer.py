"""The packer of attention-masked nested dropout: one mask for sample separation, order and dropped registers."""

from collections.abc import Sequence
from typing import Any

import torch

from flextok.model.data_dict import DataDict
from flextok.model.keep_k import checked_keep_ks
from flextok.model.packed_list import PackedList
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker, CutShape


class NestedDropoutSequencePacker(BlockWiseSequencePacker):
    """`BlockWiseSequencePacker` that hides the tokens of the last sub-sequence at index >= `keep_k` of their sample.

    Registers are the last of `input_list_read_keys`; other sub-sequences are never hidden. Hidden tokens neither attend
    nor are attended to, so the other tokens' outputs are those of a sequence without them; with `drop_masked` they are
    indeed left out of the sequence and cost nothing, and an unpacker fills their place with zeros. Without
    `keep_k_read_key` in the dictionary all tokens are visible.
    """

    def __init__(
        self,
        *args: Any,
        keep_k_read_key: str = "nested_dropout_keep_k",
        drop_masked: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.keep_k_read_key = keep_k_read_key
        self.drop_masked = drop_masked

    def _keep_ks(self, data_dict: DataDict) -> Sequence[int] | None:
        return None if self.drop_masked else self._given_keep_ks(data_dict)

    def _given_keep_ks(self, data_dict: DataDict) -> list[int] | None:
        keep_ks = data_dict.get(self.keep_k_read_key)
        batch = len(data_dict[self.input_list_read_keys[-1]])
        return None if keep_ks is None else checked_keep_ks(keep_ks, batch, self.keep_k_read_key)

    def _subsequences(self, data_dict: DataDict) -> tuple[list[PackedList], list[list[Sequence[int]]]]:
        subsequences, shapes = super()._subsequences(data_dict)
        keep_ks = self._given_keep_ks(data_dict)
        if not self.drop_masked or keep_ks is None:
            return subsequences, shapes
        if any(len(sample[-1]) != 1 for sample in shapes):
            raise ValueError(f"{self.input_list_read_keys[-1]!r} must hold 1D tokens to be cut at keep_k")
        cut = [CutShape.prefix(sample[-1], keep) for sample, keep in zip(shapes, keep_ks, strict=True)]
        subsequences[-1] = _prefixes(subsequences[-1], [shape[0] for shape in cut])
        return subsequences, [[*sample[:-1], shape] for sample, shape in zip(shapes, cut, strict=True)]


def _prefixes(entries: PackedList, lengths: list[int]) -> PackedList:
    """The first `lengths[i]` tokens of each entry `[1, n, width]`, in one gather."""
    starts = torch.tensor([0, *entries.num_tokens[:-1]]).cumsum(0)
    kept = torch.tensor(lengths)
    offsets = torch.arange(int(kept.sum())) - (kept.cumsum(0) - kept).repeat_interleave(kept)
    rows = (starts.repeat_interleave(kept) + offsets).to(entries.tensor.device)
    tokens = entries.tensor.reshape(-1, entries.tensor.shape[-1])[rows]
    return PackedList(tokens, [(1, length, tokens.shape[-1]) for length in lengths])
