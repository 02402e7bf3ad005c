"""adaLN: norms shifted and scaled, and branches gated, by an embedding of each sample (arXiv 2212.09748)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.attention.layout import SequenceLayout
from flextok.model.layers.fused import norm_modulate
from flextok.model.layers.norm import Fp32LayerNorm

EmbPackingFn = Callable[[Tensor], Tensor]
"""Maps embeddings `[batch, n * width]` to one row per token of the packed sequence, `[1, tokens, width]`."""


class EmbeddingPacker:
    """Which row of an embedding belongs to each token of a packed row.

    Called, it copies them out: `[batch, n * width]` -> `[1, tokens, width]`, no padding rows. Blocks take the index
    instead, so that no copy per token is kept. With `per_subseq`, n is the number of sub-sequences and chunk j of row i
    goes to sub-sequence j of sample i; else n is 1 and row i goes to every token of sample i.
    """

    def __init__(self, layout: SequenceLayout, device: torch.device, *, per_subseq: bool) -> None:
        self.chunks = len(layout.lengths[0]) if per_subseq else 1
        self.num_tokens = layout.num_tokens
        self.index = layout.derive(f"embedding rows {per_subseq}", device, lambda _: _rows(layout, device, per_subseq))

    def __call__(self, emb: Tensor) -> Tensor:
        return self.rows(emb).index_select(0, self.index[: self.num_tokens])[None]

    def rows(self, emb: Tensor) -> Tensor:
        """`[batch * n, width]`, what `index` points into."""
        return emb.unflatten(-1, (self.chunks, -1)).flatten(0, 1)

    def shared_index(self) -> Tensor:
        """`index` for embeddings of which only the first sample's rows were computed, because all are equal."""
        return self.index % self.chunks


def _rows(layout: SequenceLayout, device: torch.device, per_subseq: bool) -> Tensor:
    """int64 `[total]`; padding gets row 0."""
    lengths = layout.lengths if per_subseq else [(sum(row),) for row in layout.lengths]
    repeats = torch.tensor(lengths).flatten()
    rows = torch.arange(len(repeats)).repeat_interleave(repeats)
    return F.pad(rows, (0, layout.row_length - len(rows))).to(device, non_blocking=True)


def is_shared(rows: Tensor) -> bool:
    """Whether `[batch, width]` is one row expanded: the samples of a sampler's step share their time."""
    return rows.shape[0] > 1 and rows.stride(0) == 0


def per_sample(fn: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`fn` of each row of `[batch, width]`, computed once where they are one row expanded, and expanded again."""
    return fn(rows[:1]).expand(len(rows), -1) if is_shared(rows) else fn(rows)


def modulations(
    linear: nn.Module, emb: Tensor, packing_fn: EmbPackingFn, length: int, count: int
) -> tuple[list[Tensor], Tensor]:
    """`count` tensors of rows `[rows, dim]`, and the row of each of `length` tokens, int64.

    Of embeddings that are one row expanded the rows of one sample are returned.
    """
    if isinstance(packing_fn, EmbeddingPacker):
        rows = packing_fn.rows(linear(emb[:1] if is_shared(emb) else emb))
        index = packing_fn.shared_index() if is_shared(emb) else packing_fn.index
    else:
        rows = packing_fn(linear(emb)).squeeze(0)
        # Such a function leaves out the padding, whose modulation is zero.
        rows = F.pad(rows, (0, 0, 0, length - rows.shape[0]))
        index = torch.arange(length, device=rows.device)
    return list(rows.chunk(count, dim=-1)), index


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift`, of shapes that broadcast."""
    return x * (1 + scale) + shift


def modulated_norm(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """`modulate(norm(x), shift[index], scale[index])` for x `[1, tokens, dim]` and rows `[rows, dim]`."""
    if isinstance(norm, Fp32LayerNorm) and norm.weight is None and norm.bias is None:
        return norm_modulate(x, shift, scale, index, norm.eps)
    return modulate(norm(x), shift.index_select(0, index), scale.index_select(0, index))
