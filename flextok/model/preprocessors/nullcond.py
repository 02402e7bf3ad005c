"""The null condition of classifier-free guidance (arXiv 2207.12598): tokens replaced by zeros or a learned vector."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flextok.model.data_dict import NULL_CONDITION_KEY, RNG_KEY, DataDict, Generators
from flextok.model.draw import draw_uniform
from flextok.model.init import MuPInit, init_token
from flextok.model.packed_list import PackedList
from flextok.model.repeated_tail import replace_tails


def sample_null_flags(prob: float, batch: int, generator: Generators = None) -> list[bool]:
    """One flag per sample, set with probability `prob`."""
    return (draw_uniform((batch,), generator, "cpu") < prob).tolist()


class _NullCond(MuPInit):
    """Replace the entries whose flag is set.

    Evaluation reads the flags if they are there. Training draws them, unless a `DropoutSampler` did under
    `sampled_null_read_key` (ours, not in published configs).
    """

    replace_with_single_token = False

    def __init__(
        self,
        read_write_key: str,
        eval_drop_flag_read_key: str,
        dropout_prob: float,
        sampled_null_read_key: str | None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout_prob <= 1.0:
            raise ValueError(f"dropout_prob={dropout_prob} is not in [0, 1]")
        self.read_write_key = read_write_key
        self.eval_drop_flag_read_key = eval_drop_flag_read_key
        self.dropout_prob = dropout_prob
        self.sampled_null_read_key = sampled_null_read_key

    def _null(self) -> Tensor | None:
        """`[dim]`, or None for zeros."""
        return None

    def _flags(self, data_dict: DataDict, batch: int) -> list[bool] | None:
        if not self.training:
            return data_dict.get(self.eval_drop_flag_read_key)
        key = self.sampled_null_read_key
        sampled = None if key is None else data_dict.get(key)
        if sampled is not None or self.dropout_prob == 0.0:
            return sampled
        return sample_null_flags(self.dropout_prob, batch, data_dict.get(RNG_KEY))

    def _replace(self, entries: Sequence[Tensor], flags: list[bool]) -> PackedList:
        null = self._null()
        packed = PackedList.pack(entries)
        if not self.training and not self.replace_with_single_token and all(len(shape) == 3 for shape in packed.shapes):
            keep = [0 if flag else n for flag, n in zip(flags, packed.num_tokens, strict=True)]
            width = packed.shapes[0][-1]
            return replace_tails(packed, keep, torch.zeros(width, device=entries[0].device) if null is None else null)
        if packed.is_uniform and not self.replace_with_single_token:
            x = packed.tensor
            flagged = torch.tensor(flags).to(x.device, non_blocking=True).view(-1, *(1,) * (x.ndim - 1))
            return PackedList(torch.where(flagged, x.new_zeros(()) if null is None else null.to(x.dtype), x))
        replaced = []
        for entry, flag in zip(packed, flags, strict=True):
            shape = (entry.shape[0], 1, entry.shape[-1]) if self.replace_with_single_token else entry.shape
            filler = entry.new_zeros(shape) if null is None else null.to(entry.dtype).expand(shape)
            replaced.append(filler if flag else entry)
        return PackedList.pack(replaced)

    def forward(self, data_dict: DataDict) -> DataDict:
        entries = data_dict[self.read_write_key]
        flags = self._flags(data_dict, len(entries))
        if flags is None:
            return data_dict
        if len(flags) != len(entries):
            raise ValueError(f"{self.eval_drop_flag_read_key} has {len(flags)} flags for a batch of {len(entries)}")
        data_dict[self.read_write_key] = self._replace(entries, [bool(flag) for flag in flags])
        return data_dict


class ZeroNullCond(_NullCond):
    """Replace the tokens of flagged samples by zeros."""

    def __init__(
        self,
        read_write_key: str,
        eval_drop_flag_read_key: str = NULL_CONDITION_KEY,
        dropout_prob: float = 0.0,
        sampled_null_read_key: str | None = None,
    ) -> None:
        super().__init__(read_write_key, eval_drop_flag_read_key, dropout_prob, sampled_null_read_key)

    def _init_weights(self, *, mup: bool) -> None:
        pass


class LearnedNullCond(_NullCond):
    """Replace the tokens of flagged samples by a learned vector, at every position or as one single token."""

    def __init__(
        self,
        read_write_key: str,
        dim: int,
        eval_drop_flag_read_key: str = NULL_CONDITION_KEY,
        dropout_prob: float = 0.0,
        replace_with_single_token: bool = False,
        sampled_null_read_key: str | None = None,
    ) -> None:
        super().__init__(read_write_key, eval_drop_flag_read_key, dropout_prob, sampled_null_read_key)
        self.replace_with_single_token = replace_with_single_token
        self.nullcond = nn.Parameter(torch.empty(dim))
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        init_token(self.nullcond)

    def _null(self) -> Tensor:
        return self.nullcond
