"""Position embeddings: fixed 2D sincos tables and learned tables."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.model.data_dict import DataDict
from flextok.model.init import MuPInit, init_token
from flextok.model.packed_list import PackedList

POSEMB_TYPES = ("sincos", "learnable_sum", "learnable_prod")


def build_2d_sincos_posemb(h: int, w: int, embed_dim: int = 1024, temperature: float = 10000.0) -> Tensor:
    """Sincos table `[1, embed_dim, h, w]`.

    Cell number n = i * w + j is read as the pair (n // h, n % h). On square grids that is (i, j); on others the table
    is scrambled, and stays so because released weights were trained with it.
    """
    if embed_dim % 4:
        raise ValueError(f"a 2D sincos position embedding needs a width divisible by 4, got {embed_dim}")
    omega = temperature ** -(torch.arange(embed_dim // 4, dtype=torch.float32) / (embed_dim // 4))
    cell = torch.arange(h * w)
    parts = []
    for coordinate in (cell // h, cell % h):
        angles = coordinate[:, None].float() * omega
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).T.reshape(1, embed_dim, h, w)


class PositionalEmbedding(MuPInit):
    """A table of position embeddings, cropped from the origin (`absolute`) or resized (`interpolate`) to a shape.

    `posembs` is in the state dict in every mode: `[1, dim, *max_sizes]` for sincos (not trained), and
    `[num_axes, 1, dim, max_size]` for learned tables, of which the axes are summed or multiplied.
    """

    def __init__(
        self,
        dim: int,
        max_sizes: Sequence[int],
        posemb_type: Literal["sincos", "learnable_sum", "learnable_prod"] = "sincos",
        posemb_scaling: Literal["absolute", "interpolate"] = "absolute",
    ) -> None:
        super().__init__()
        if posemb_type not in POSEMB_TYPES:
            raise ValueError(f"posemb_type={posemb_type!r} is unknown; valid: {', '.join(POSEMB_TYPES)}")
        if posemb_scaling not in ("absolute", "interpolate"):
            raise ValueError(f"posemb_scaling={posemb_scaling!r} is unknown; valid: absolute, interpolate")
        self.max_sizes = list(max_sizes)
        self.posemb_type = posemb_type
        self.posemb_scaling = posemb_scaling
        if posemb_type == "sincos":
            if len(self.max_sizes) != 2:
                raise ValueError(f"posemb_type='sincos' needs two max_sizes, got {self.max_sizes}")
            self.posembs = nn.Parameter(
                build_2d_sincos_posemb(self.max_sizes[0], self.max_sizes[1], dim), requires_grad=False
            )
        else:
            if len(set(self.max_sizes)) != 1 or len(self.max_sizes) > 2:
                raise ValueError(f"learned position tables need one or two equal max_sizes, got {self.max_sizes}")
            self.posembs = nn.Parameter(torch.empty(len(self.max_sizes), 1, dim, self.max_sizes[0]))
            self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        if self.posemb_type != "sincos":
            init_token(self.posembs)

    def _table(self) -> Tensor:
        """`[1, dim, *max_sizes]`."""
        if self.posemb_type == "sincos":
            return self.posembs
        if len(self.max_sizes) == 1:
            return self.posembs[0]
        rows, columns = self.posembs[0][..., :, None], self.posembs[1][..., None, :]
        return rows + columns if self.posemb_type == "learnable_sum" else rows * columns

    def embedding(self, shape: Sequence[int]) -> Tensor:
        """`[1, dim, *shape]`."""
        table = self._table()
        if self.posemb_scaling == "interpolate":
            mode = "linear" if len(shape) == 1 else "bilinear"
            return F.interpolate(table, size=tuple(shape), mode=mode, align_corners=True)
        if len(shape) != len(self.max_sizes) or any(n > m for n, m in zip(shape, self.max_sizes, strict=True)):
            raise ValueError(
                f"positions {list(shape)} exceed max_sizes={self.max_sizes}: the model was built for smaller inputs"
            )
        for axis, size in enumerate(shape):
            table = table.narrow(2 + axis, 0, size)
        return table

    def forward(self, shape: Sequence[int]) -> Tensor:
        return self.embedding(shape)


class PositionalEmbeddingAdder(PositionalEmbedding):
    """Add position embeddings to channels-last entries `[1, *shape, dim]`, or to a tensor `[batch, *shape, dim]`.

    `posemb_write_key` receives the embeddings alone, in the form of the input.
    """

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        max_sizes: Sequence[int],
        posemb_type: Literal["sincos", "learnable_sum", "learnable_prod"],
        posemb_scaling: Literal["absolute", "interpolate"],
        posemb_write_key: str | None = None,
    ) -> None:
        super().__init__(dim, max_sizes, posemb_type, posemb_scaling)
        self.read_key, self.write_key, self.posemb_write_key = read_key, write_key, posemb_write_key

    def _channels_last(self, shape: Sequence[int]) -> Tensor:
        """`[1, *shape, dim]`."""
        return self.embedding(shape).movedim(1, -1)

    def _packed_embeddings(self, entries: PackedList) -> PackedList:
        if not entries.is_uniform:
            return PackedList.pack([self._channels_last(shape[1:-1]) for shape in entries.shapes])
        table = self._channels_last(entries.tensor.shape[1:-1])
        return PackedList(table.expand(len(entries), *table.shape[1:]))

    def forward(self, data_dict: DataDict) -> DataDict:  # type: ignore[override]
        entries = data_dict[self.read_key]
        posemb: Tensor | PackedList
        added: Tensor | PackedList
        if isinstance(entries, Tensor):
            posemb = self._channels_last(entries.shape[1:-1])
            added = entries + posemb
        else:
            entries = PackedList.pack(entries)
            posemb = self._packed_embeddings(entries)
            added = entries.map(posemb.tensor.add)
        data_dict[self.write_key] = added
        if self.posemb_write_key is not None:
            data_dict[self.posemb_write_key] = posemb
        return data_dict
