"""How the tokens of a batch lie in one packed row, and who may attend to whom.

A layout is a value: lengths, a mask mode and how many trailing tokens of each sample are kept. The mask follows from it
in whatever form a backend wants, so nothing of size tokens x tokens is built unless somebody asks for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flextok.attention.masks.packed import MaskMod, packed_mask

MaskMode = Literal["full", "causal", "causal_last"]
T = TypeVar("T")


class TokenTable(NamedTuple):
    """Per token of the packed row, each `[total]`: the facts every mask is computed from."""

    sample: Tensor
    """int32: index of the sample; -1 for tokens nobody attends to and that attend to nobody (padding, dropped)."""
    position: Tensor
    """int32: position within the sample."""
    before_last: Tensor
    """bool: the token lies before its sample's last sub-sequence."""


@dataclass(frozen=True)
class SequenceLayout:
    """Samples one after another, each the concatenation of its sub-sequences, zero padding at the end.

    Token q attends to token k iff both belong to one sample, neither is padding or dropped, and the mode allows it:
    `full` everything; `causal` k <= q; `causal_last` k <= q or k lies before the last sub-sequence. Dropped are the
    tokens of the last sub-sequence at index >= `keep_last` of their sample.

    With `last_counts` the last token of each sample stands for that many equal tokens: they stay equal in every layer,
    so one of them is computed and its key counts `last_counts` times, by log(count) added to its score.
    """

    lengths: tuple[tuple[int, ...], ...]
    """Per sample, the length of each sub-sequence."""
    mode: MaskMode = "full"
    keep_last: tuple[int, ...] | None = None
    """Per sample, how many tokens of the last sub-sequence are kept; None keeps all."""
    total: int | None = None
    """Length of the packed row with padding; None means no padding."""
    last_counts: tuple[int, ...] | None = None
    """Per sample, how many equal tokens its last one stands for, at least 1; None: each token is one. Mode full only:
    under an order equal tokens see different keys and do not stay equal."""
    sample_lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Per sample, the tokens of all its sub-sequences."""
    is_uniform: bool = field(init=False, repr=False, compare=False)
    """True if all samples have the same sub-sequence lengths."""
    visible_lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Per sample, how many of its tokens nested dropout leaves visible: hidden ones are at its end."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(MaskMode):
            raise ValueError(f"mask_mode={self.mode!r} is unknown; valid: {', '.join(get_args(MaskMode))}")
        if not self.lengths or any(len(row) != len(self.lengths[0]) or not row for row in self.lengths):
            raise ValueError(f"lengths={self.lengths}: valid are samples of equally many sub-sequences, at least one")
        if self.keep_last is not None and len(self.keep_last) != len(self.lengths):
            raise ValueError(f"keep_k has {len(self.keep_last)} entries for a batch of {len(self.lengths)}")
        if self.keep_last is not None and min(self.keep_last) < 0:
            raise ValueError(f"keep_k={list(self.keep_last)}: valid are numbers >= 0")
        if self.last_counts is not None:
            self._check_counts(self.last_counts)
        # Set here and not on first use: a lock-guarded cached property would break compiled graphs.
        object.__setattr__(self, "sample_lengths", tuple(map(sum, self.lengths)))
        object.__setattr__(self, "is_uniform", all(row == self.lengths[0] for row in self.lengths))
        object.__setattr__(self, "visible_lengths", tuple(self._visible()))
        if self.total is not None and self.total < self.num_tokens:
            raise ValueError(f"{self.num_tokens} tokens do not fit in a packed row of {self.total}")

    @cached_property
    def _derived(self) -> dict[tuple[str, torch.device], Any]:
        # No field: FSDP2 goes through those of a block's inputs, and a plan in here holds this layout.
        return {}

    def _visible(self) -> Iterator[int]:
        for row, keep in zip(self.lengths, self.keep_last or [None] * len(self.lengths), strict=True):
            yield sum(row) if keep is None else sum(row[:-1]) + min(keep, row[-1])

    def _check_counts(self, counts: tuple[int, ...]) -> None:
        if self.mode != "full" or self.keep_last is not None:
            raise ValueError(
                f"equal tokens can be counted under mask_mode='full' without keep_k only, not {self.mode!r}"
            )
        if len(counts) != len(self.lengths) or min(counts) < 1:
            raise ValueError(f"last_counts={counts}: valid is one number >= 1 for each of {len(self.lengths)} samples")

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.sample_lengths)

    @property
    def row_length(self) -> int:
        """Tokens with padding."""
        return self.num_tokens if self.total is None else self.total

    def derive(self, name: str, device: torch.device, build: Callable[[torch.device], T]) -> T:
        """What `build(device)` returns, built once per layout: all layers of a forward pass share it."""
        if (name, device) not in self._derived:
            self._derived[name, device] = build(device)
        return self._derived[name, device]

    def table(self, device: torch.device) -> TokenTable:
        """The token table on `device`."""
        return self.derive("table", device, self._build_table)

    def _build_table(self, device: torch.device) -> TokenTable:
        # NumPy: for rows of many samples several times faster than the same with tensors.
        lengths = np.array(self.sample_lengths, dtype=np.int32)
        starts = lengths.cumsum(dtype=np.int32) - lengths
        before_last = lengths - np.array([row[-1] for row in self.lengths], dtype=np.int32)
        place = np.arange(self.num_tokens, dtype=np.int32)
        sample = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        if self.keep_last is not None:
            sample[place >= np.repeat(starts + np.array(self.visible_lengths, dtype=np.int32), lengths)] = -1
        padding = (0, self.row_length - self.num_tokens)
        columns = (
            np.pad(sample, padding, constant_values=-1),
            np.pad(place - np.repeat(starts, lengths), padding),
            np.pad(place < np.repeat(starts + before_last, lengths), padding),
        )
        return TokenTable(*(torch.from_numpy(column).to(device, non_blocking=True) for column in columns))

    def mask_mod(self, device: torch.device) -> MaskMod:
        """The mask as a FlexAttention `mask_mod` over positions of the packed row."""
        return packed_mask(*self.table(device), mode=self.mode)

    def rows_of(self, subsequences: Sequence[int], device: torch.device) -> Tensor:
        """int64: the places in the row of the tokens of some sub-sequences of every sample, ascending."""
        return self.derive(
            f"rows of {subsequences}",
            device,
            lambda _: self._build_rows_of(subsequences).to(device, non_blocking=True),
        )

    def _build_rows_of(self, subsequences: Sequence[int]) -> Tensor:
        lengths = torch.tensor(self.lengths)
        wanted = torch.zeros_like(lengths, dtype=torch.bool)
        wanted[:, list(subsequences)] = True
        return wanted.flatten().repeat_interleave(lengths.flatten()).nonzero()[:, 0]

    def key_bias(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """`[total]` to add to the scores of each key, log(count); None where every token is one."""
        if self.last_counts is None:
            return None
        return self.derive(
            f"key_bias {dtype}", device, lambda device: self._build_key_bias().to(device, dtype, non_blocking=True)
        )

    def _build_key_bias(self) -> Tensor:
        assert self.last_counts is not None
        bias = torch.zeros(self.row_length, dtype=torch.float64)
        lengths = torch.tensor(self.sample_lengths)
        # A sample without tokens has no last one.
        ends, counts = (x[lengths > 0] for x in (lengths.cumsum(0), torch.tensor(self.last_counts)))
        bias[ends - 1] = counts.double().log()
        return bias

    def block_mask(self, device: torch.device) -> BlockMask:
        """The mask as a FlexAttention `BlockMask` `[1, 1, total, total]`."""
        from flextok.attention.block_masks import packed_block_mask

        return self.derive("block_mask", device, lambda _: packed_block_mask(self, device))

    def dense_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """The mask as a bool matrix `[total, total]`, True where a query (row) attends to a key (column)."""
        index = torch.arange(self.row_length, device=device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        return self.mask_mod(torch.device(device))(zero, zero, index[:, None], index[None, :])


def layout_of(
    lengths: Sequence[Sequence[int]],
    *,
    mode: MaskMode = "full",
    keep_last: Sequence[int] | None = None,
    total: int | None = None,
    last_counts: Sequence[int] | None = None,
) -> SequenceLayout:
    """A `SequenceLayout` from any sequences of ints; counts that are all 1 are none."""
    keep = None if keep_last is None else tuple(int(keep) for keep in keep_last)
    counts = None if last_counts is None or set(last_counts) <= {1} else tuple(last_counts)
    return SequenceLayout(tuple(tuple(row) for row in lengths), mode, keep, total, counts)
