"""Sub-sequences of all samples into one packed row, with the mask that keeps samples apart."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.attention.layout import MaskMode, layout_of
from flextok.model.data_dict import DataDict
from flextok.model.keep_k import checked_keep_ks
from flextok.model.layers.modulation import EmbeddingPacker
from flextok.model.packed_list import PackedList
from flextok.model.packed_shapes import CutShape, PackedShapes
from flextok.model.repeated_tail import RepeatedTail, distinct

T = TypeVar("T")


class BlockWiseSequencePacker(nn.Module):
    """Concatenate the sub-sequences of each sample, then the samples, into `[1, tokens, width]`.

    Under `block_mask_write_key` goes the `SequenceLayout` of the row (every attention layer accepts it), or with
    `return_materialized_mask` the dense bool mask `[1, 1, tokens, tokens]`. `compile_block_mask` is accepted for
    published configs and has no effect: no mask is built until a backend asks for one.

    Evaluation packs no token that cannot matter: of equal ones at the end of a sample (a `RepeatedTail`) one, whose key
    the layout counts, where the mask mode leaves them equal; and none that nested dropout hides. The attribute
    `shortens_rows=False` packs them all, for trunks that tell positions apart.

    Two more keys (ours, not in published configs) name what a `DropoutSampler` knows that nobody will read; it is left
    out, and unpacked as zeros: `sampled_keep_k_read_key` the tokens of each sample's last sub-sequence at index >=
    `keep_k`, which changes no other token where none sees those after it, so `mask_mode` must be `causal` or
    `causal_last`; `sampled_null_read_key` the samples whose flag is set.
    """

    def __init__(
        self,
        input_list_read_keys: Sequence[str],
        packed_seq_write_key: str,
        block_mask_write_key: str,
        inner_packed_shapes_write_key: str,
        outer_packed_shapes_write_key: str,
        mask_mode: MaskMode = "full",
        max_seq_len: int | None = None,
        pad_to_multiple: int | None = None,
        emb_packing_fn_write_key: str | None = None,
        per_subseq_embs: bool = False,
        compile_block_mask: bool = True,
        return_materialized_mask: bool = False,
        sampled_keep_k_read_key: str | None = None,
        sampled_null_read_key: str | None = None,
    ) -> None:
        super().__init__()
        if sampled_keep_k_read_key is not None and mask_mode == "full":
            raise ValueError(
                f"sampled_keep_k_read_key={sampled_keep_k_read_key!r} leaves out tokens that mask_mode='full' shows to "
                "the others; give null, or mask_mode=causal_last"
            )
        if max_seq_len is not None and pad_to_multiple is not None:
            raise ValueError(f"give max_seq_len ({max_seq_len}) or pad_to_multiple ({pad_to_multiple}), not both")
        self.input_list_read_keys = list(input_list_read_keys)
        self.packed_seq_write_key = packed_seq_write_key
        self.block_mask_write_key = block_mask_write_key
        self.inner_packed_shapes_write_key = inner_packed_shapes_write_key
        self.outer_packed_shapes_write_key = outer_packed_shapes_write_key
        self.emb_packing_fn_write_key = emb_packing_fn_write_key
        self.mask_mode: MaskMode = mask_mode
        self.max_seq_len = max_seq_len
        self.pad_to_multiple = pad_to_multiple
        self.per_subseq_embs = per_subseq_embs
        self.return_materialized_mask = return_materialized_mask
        self.sampled_keep_k_read_key = sampled_keep_k_read_key
        self.sampled_null_read_key = sampled_null_read_key
        self.shortens_rows = True

    def _row_length(self, num_tokens: int, shapes: PackedShapes) -> int:
        if not self.training and shapes.is_cut:
            # Padding is for readers of the published row, which this one is not.
            return num_tokens
        if self.max_seq_len is not None:
            return self.max_seq_len
        return num_tokens + (-num_tokens) % (self.pad_to_multiple or 1)

    def _keep_ks(self, data_dict: DataDict) -> Sequence[int] | None:
        """How many tokens of each sample's last sub-sequence are visible; None means all."""
        return None

    def _limits(self, data_dict: DataDict) -> Sequence[int] | None:
        """How many tokens of each sample's last sub-sequence are packed; None means all."""
        return self._read_keep_ks(data_dict, self.sampled_keep_k_read_key)

    def _read_keep_ks(self, data_dict: DataDict, key: str | None) -> list[int] | None:
        keep_ks = None if key is None else data_dict.get(key)
        if key is None or keep_ks is None:
            return None
        return checked_keep_ks(keep_ks, len(data_dict[self.input_list_read_keys[-1]]), key)

    def _left_out(self, data_dict: DataDict, batch: int) -> Sequence[bool]:
        """Which samples are not packed at all; a row of no tokens would help nobody."""
        key = self.sampled_null_read_key
        flags = () if key is None else data_dict.get(key, ())
        return [False] * batch if all(flags) else flags

    def _subsequences(self, data_dict: DataDict) -> tuple[list[PackedList], PackedShapes, Sequence[int] | None]:
        """What to pack, its shapes, and how many equal tokens each sample's last one stands for."""
        subsequences = [PackedList.pack(data_dict[key]) for key in self.input_list_read_keys]
        batches = [len(entries) for entries in subsequences]
        if len(set(batches)) > 1:
            raise ValueError(f"{self.input_list_read_keys} hold different numbers of samples: {batches}")
        samples = zip(*(entries.shapes for entries in subsequences), strict=True)
        shapes: list[list[Sequence[int]]] = [[torch.Size(shape[1:-1]) for shape in sample] for sample in samples]
        limits, last = self._limits(data_dict), subsequences[-1]
        left_out = self._left_out(data_dict, len(last))
        if any(left_out):
            limits = list(last.num_tokens) if limits is None else limits
            limits = [0 if out else limit for out, limit in zip(left_out, limits, strict=True)]
        if limits is not None and any(len(sample[-1]) != 1 for sample in shapes):
            raise ValueError(f"{self.input_list_read_keys[-1]!r} must hold 1D tokens to be cut at keep_k")
        counts_repeats = (
            self.shortens_rows
            and self.mask_mode == "full"
            and not self.return_materialized_mask
            and self._keep_ks(data_dict) is None
        )
        if limits is None and not (isinstance(last, RepeatedTail) and counts_repeats):
            return subsequences, PackedShapes(shapes), None
        whole = last if counts_repeats else PackedList(last.tensor, None if last.is_uniform else last.shapes)
        stored, counts, full = distinct(whole)
        visible = [min(n, keep) for n, keep in zip(full, full if limits is None else limits, strict=True)]
        # Of the last of n stored tokens, which stands for `count`, so many lie below the limit.
        last_counts = [v - (n - 1) for v, n in zip(visible, stored.num_tokens, strict=True)]
        lengths = [min(v, n) for v, n in zip(visible, stored.num_tokens, strict=True)]
        subsequences[-1] = stored.prefixes(lengths) if list(stored.num_tokens) != lengths else stored
        for sample, length, n, v in zip(shapes, lengths, full, visible, strict=True):
            sample[-1] = CutShape.of(length, full=(n,), visible=v)
        if any(left_out):
            for j, entries in enumerate(subsequences[:-1]):
                kept = zip(left_out, entries.num_tokens, strict=True)
                subsequences[j] = entries.prefixes([0 if out else n for out, n in kept])
                for sample, out in zip(shapes, left_out, strict=True):
                    sample[j] = CutShape.of(0, full=sample[j], visible=0) if out else sample[j]
        return subsequences, PackedShapes(shapes), [max(1, count) for count in last_counts]

    def forward(self, data_dict: DataDict) -> DataDict:
        subsequences, shapes, last_counts = self._subsequences(data_dict)
        num_tokens = sum(map(sum, shapes.lengths))
        layout = layout_of(
            shapes.lengths,
            mode=self.mask_mode,
            keep_last=self._keep_ks(data_dict),
            total=self._row_length(num_tokens, shapes),
            last_counts=last_counts,
        )
        # Equal to those of an earlier call, as in each step of a sampler: these have their masks and indices already.
        layout = _earlier(data_dict.get(self.block_mask_write_key), layout)
        shapes = _earlier(data_dict.get(self.inner_packed_shapes_write_key), shapes)
        row = _concatenate(subsequences, shapes, padding=layout.row_length - num_tokens)
        mask = layout.dense_mask(row.device)[None, None] if self.return_materialized_mask else layout
        data_dict[self.packed_seq_write_key] = row
        data_dict[self.block_mask_write_key] = mask
        data_dict[self.inner_packed_shapes_write_key] = shapes
        data_dict[self.outer_packed_shapes_write_key] = [torch.Size([n]) for n in layout.sample_lengths]
        if self.emb_packing_fn_write_key is not None:
            data_dict[self.emb_packing_fn_write_key] = EmbeddingPacker(
                layout, row.device, per_subseq=self.per_subseq_embs
            )
        return data_dict


def _earlier(before: Any, now: T) -> T:
    return before if type(before) is type(now) and before == now else now


def _concatenate(subsequences: list[PackedList], shapes: PackedShapes, *, padding: int) -> Tensor:
    """`[1, tokens, width]`: sample by sample, the sub-sequences of each in order, then zeros."""
    if all(entries.is_uniform for entries in subsequences):
        row = torch.cat([entries.tensor.flatten(1, -2) for entries in subsequences], dim=1).flatten(0, 1)
        return F.pad(row, (0, 0, 0, padding))[None]
    tokens = [entries.tensor.reshape(-1, entries.tensor.shape[-1]) for entries in subsequences]
    if padding:
        tokens.append(tokens[0].new_zeros(1, tokens[0].shape[-1]))
    return torch.cat(tokens).index_select(0, shapes.order(tokens[0].device, padding=padding))[None]
