"""Sub-sequences of all samples into one packed row, with the mask that keeps samples apart."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.attention.layout import MaskMode, SequenceLayout, layout_of
from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList


class CutShape(tuple[int, ...]):
    """Shape of a sub-sequence of which only a prefix was packed; it is unpacked to `full`, zeros at the end."""

    full: Sequence[int]

    @classmethod
    def prefix(cls, full: Sequence[int], keep: int) -> "CutShape":
        shape = cls((min(keep, full[0]),))
        shape.full = full
        return shape


class EmbeddingPacker:
    """Spread embeddings over the tokens of a packed row: `[batch, n * width]` -> `[1, tokens, width]`, no padding rows.

    With `per_subseq`, n is the number of sub-sequences and chunk j of row i goes to sub-sequence j of sample i; else
    n is 1 and row i goes to every token of sample i.
    """

    def __init__(self, layout: SequenceLayout, *, per_subseq: bool) -> None:
        self.layout = layout
        self.per_subseq = per_subseq

    def __call__(self, emb: Tensor) -> Tensor:
        lengths = self.layout.lengths if self.per_subseq else [(sum(row),) for row in self.layout.lengths]
        chunks = emb.unflatten(-1, (len(lengths[0]), -1))
        if self.layout.is_uniform:
            # Expanded views, copied once: the gradient is a plain sum over each sub-sequence.
            rows = [chunks[:, j : j + 1].expand(-1, n, -1) for j, n in enumerate(lengths[0])]
            return torch.cat(rows, dim=1).flatten(0, 1)[None]
        repeats = torch.tensor(lengths, device=emb.device).flatten()
        return chunks.flatten(0, 1).repeat_interleave(repeats, dim=0)[None]


class BlockWiseSequencePacker(nn.Module):
    """Concatenate the sub-sequences of each sample, then the samples, into `[1, tokens, width]`.

    Under `block_mask_write_key` goes the `SequenceLayout` of the row (every attention layer accepts it), or with
    `return_materialized_mask` the dense bool mask `[1, 1, tokens, tokens]`. `compile_block_mask` is accepted for
    published configs and has no effect: no mask is built until a backend asks for one.
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
    ) -> None:
        super().__init__()
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

    def _row_length(self, num_tokens: int) -> int:
        if self.max_seq_len is not None:
            return self.max_seq_len
        return num_tokens + (-num_tokens) % (self.pad_to_multiple or 1)

    def _keep_ks(self, data_dict: DataDict) -> Sequence[int] | None:
        """How many tokens of each sample's last sub-sequence are visible; None means all."""
        return None

    def _subsequences(self, data_dict: DataDict) -> tuple[list[PackedList], list[list[Sequence[int]]]]:
        """What to pack, and per sample the shape of each sub-sequence without batch and channel axes."""
        subsequences = [PackedList.pack(data_dict[key]) for key in self.input_list_read_keys]
        batches = [len(entries) for entries in subsequences]
        if len(set(batches)) > 1:
            raise ValueError(f"{self.input_list_read_keys} hold different numbers of samples: {batches}")
        samples = zip(*(entries.shapes for entries in subsequences), strict=True)
        return subsequences, [[torch.Size(shape[1:-1]) for shape in sample] for sample in samples]

    def forward(self, data_dict: DataDict) -> DataDict:
        subsequences, inner_shapes = self._subsequences(data_dict)
        lengths = [[prod(shape) for shape in shapes] for shapes in inner_shapes]
        num_tokens = sum(map(sum, lengths))
        layout = layout_of(
            lengths, mode=self.mask_mode, keep_last=self._keep_ks(data_dict), total=self._row_length(num_tokens)
        )
        row = _concatenate(subsequences)
        mask = layout.dense_mask(row.device)[None, None] if self.return_materialized_mask else layout
        data_dict[self.packed_seq_write_key] = F.pad(row, (0, 0, 0, layout.row_length - num_tokens))
        data_dict[self.block_mask_write_key] = mask
        data_dict[self.inner_packed_shapes_write_key] = inner_shapes
        data_dict[self.outer_packed_shapes_write_key] = [torch.Size([sum(sample)]) for sample in lengths]
        if self.emb_packing_fn_write_key is not None:
            data_dict[self.emb_packing_fn_write_key] = EmbeddingPacker(layout, per_subseq=self.per_subseq_embs)
        return data_dict


def _concatenate(subsequences: list[PackedList]) -> Tensor:
    """`[1, tokens, width]`: sample by sample, the sub-sequences of each in order."""
    if all(entries.is_uniform for entries in subsequences):
        return torch.cat([entries.tensor.flatten(1, -2) for entries in subsequences], dim=1).flatten(0, 1)[None]
    samples = zip(*subsequences, strict=True)
    return torch.cat([entry.flatten(1, -2) for sample in samples for entry in sample], dim=1)
