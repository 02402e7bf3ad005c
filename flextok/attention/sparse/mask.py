"""`Mask`: for every query and key, the probability with which the pair is selected.

0 is not selected, 1 is certain, and p between them was picked by a random draw that picks this pair with probability p.
Attention weights a pair by 1/p, which makes sums over the selected pairs unbiased estimates of sums over all of them.

A mask is stored as a number (all ones, all zeros), a dense tensor or compressed rows. It is a value: stored tensors are
never written to and never handed out, so masks may share them, and only `merge_mask(..., inplace=True)` changes a mask.
"""

from typing import Any

import torch
from torch import Tensor

from flextok.attention.sparse.rows import (
    Rows,
    dense_from_rows,
    merged_rows,
    rows_from_columns,
    rows_from_dense,
    rows_of,
)

Device = torch.device | str | None


class Mask:
    """Inclusion probabilities of shape `(..., n)`, in attention `(B, H, Sq, Sk)`; made by the class methods."""

    def __init__(self, shape: Any, dtype: torch.dtype, device: Device, store: float | Tensor | Rows) -> None:
        self.shape = tuple(int(size) for size in shape)
        if not self.shape or min(self.shape) < 0:
            raise ValueError(f"shape={shape!r}; valid: one size or more, none below 0")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}; valid: a floating point type, for values are probabilities")
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device
        self._store = store
        self._is_constant_checked = isinstance(store, float)

    @classmethod
    def create_full_mask(cls, shape: Any, dtype: torch.dtype = torch.float32, device: Device = None) -> "Mask":
        """All ones."""
        return cls(shape, dtype, device, 1.0)

    @classmethod
    def create_empty_mask(cls, shape: Any, dtype: torch.dtype = torch.float32, device: Device = None) -> "Mask":
        """All zeros."""
        return cls(shape, dtype, device, 0.0)

    @classmethod
    def create_mask_from_dense_mask(
        cls, shape: Any, mask: Tensor, dtype: torch.dtype = torch.float32, *, validate: bool = True
    ) -> "Mask":
        """A copy of `mask`, a tensor of `shape`, bool or of numbers.

        `validate=False` skips the look at the values and the copy: for tensors that nobody writes to.

        Raises:
            ValueError: another shape, or a value that is no number in [0, 1].
        """
        if tuple(mask.shape) != tuple(shape):
            raise ValueError(f"mask has shape {list(mask.shape)}; valid: {list(shape)}")
        if validate:
            _check_values("mask", mask)
            mask = mask.detach().clone()
        return cls(shape, dtype, mask.device, mask.to(dtype))

    @classmethod
    def create_mask_from_indices(
        cls,
        shape: Any,
        indices: Tensor,
        ptr: Tensor,
        data: Tensor | None,
        dtype: torch.dtype = torch.float32,
        *,
        validate: bool = True,
    ) -> "Mask":
        """Compressed rows: all but the last dimension are flattened to R rows.

        Args:
            indices: `(entries,)`, flat positions `row * n + column`, the rows one after another.
            ptr: `(R + 1,)`, where each row begins in `indices`; the last is `entries`.
            data: `(entries,)` values, None for ones.

        Raises:
            ValueError: an index outside its row or twice in it, a wrong `ptr`, a value that is no number in [0, 1].
        """
        values = torch.ones(indices.shape, dtype=dtype, device=indices.device) if data is None else data
        rows = Rows(indices.detach().long(), ptr.detach().long(), values.detach().to(dtype))
        if validate:
            _check_values("data", values)
            rows = rows_of(shape, rows)
        return cls(shape, dtype, indices.device, rows)

    @classmethod
    def create_from_row_wise_idx(
        cls,
        shape: Any,
        row_wise_idx: Tensor,
        data: Tensor | None,
        mask_type: str,
        dtype: torch.dtype = torch.float32,
        use_padding: bool = False,
        *,
        validate: bool = True,
    ) -> "Mask":
        """k column numbers per row, `(..., k)`, with their values, None for ones.

        Args:
            mask_type: how the result is stored: "index" or "dense".
            use_padding: a column of -1 is no entry.

        Raises:
            ValueError: as for compressed rows, or another `mask_type`.
        """
        if mask_type not in ("index", "dense"):
            raise ValueError(f"mask_type={mask_type!r}; valid: index, dense")
        shape = tuple(shape)
        if row_wise_idx.ndim != len(shape) or tuple(row_wise_idx.shape[:-1]) != shape[:-1]:
            raise ValueError(f"row_wise_idx has shape {list(row_wise_idx.shape)}; valid: {[*shape[:-1], 'k']}")
        values = torch.ones(row_wise_idx.shape, device=row_wise_idx.device) if data is None else data
        if values.shape != row_wise_idx.shape:
            raise ValueError(f"data has shape {list(values.shape)}; valid: {list(row_wise_idx.shape)}")
        if validate:
            lowest = -1 if use_padding else 0
            outside = (row_wise_idx < lowest) | (row_wise_idx >= shape[-1])
            if outside.any():
                raise ValueError(
                    f"row_wise_idx holds column {int(row_wise_idx[outside][0])}; valid: {lowest} to {shape[-1] - 1}"
                )
        mask = cls.create_mask_from_indices(
            shape, *rows_from_columns(row_wise_idx, values.to(dtype), shape[-1]), dtype, validate=validate
        )
        if mask_type == "dense":
            mask._store = mask._dense()
        return mask

    # --- what it holds ------------------------------------------------------------------------------------------------

    def is_full_mask(self) -> bool:
        """Whether every value is 1."""
        return self._constant() == 1.0

    def is_empty_mask(self) -> bool:
        """Whether every value is 0."""
        return self._constant() == 0.0

    def get_dense_mask(self) -> Tensor:
        """A new tensor with the values."""
        return self._dense().clone(memory_format=torch.contiguous_format)

    def get_index_mask(self) -> tuple[Tensor, Tensor, Tensor]:
        """New tensors `(indices, ptr, data)` of the compressed rows: entries above 0, ascending."""
        indices, ptr, data = self._rows()
        return indices.clone(), ptr.clone(), data.clone()

    def get_density(self) -> float:
        """The share of values above 0."""
        constant = self._constant()
        if constant is not None:
            return constant
        selected = len(self._store.data) if isinstance(self._store, Rows) else int(self._dense().count_nonzero())
        return selected / self._dense_numel()

    # --- what is done with it -----------------------------------------------------------------------------------------

    def apply_mask(self, x: Tensor, mode: str = "dense") -> Tensor:
        """`x * value`; `x` itself for a full mask. Both modes, "dense" and "sparse", give the same."""
        return self._applied(x, mode, lambda x, value: x * value)

    def apply_inv_mask(self, x: Tensor, mode: str = "dense") -> Tensor:
        """`x / value` where the value is above 0, else 0; `x` itself for a full mask."""
        return self._applied(x, mode, lambda x, value: x / value)

    def merge_mask(self, other: "Mask", inplace: bool = False, mode: str = "dense") -> "Mask":
        """The mask with values `min(1, a + b)`; `inplace` makes it this one. `mode` says how it is stored.

        Raises:
            ValueError: shapes differ, or another `mode`.
        """
        _check_mode(mode)
        if other.shape != self.shape:
            raise ValueError(f"other has shape {list(other.shape)}; valid: {list(self.shape)}")
        merged = Mask(self.shape, torch.promote_types(self.dtype, other.dtype), self.device, self._merged(other, mode))
        if not inplace:
            return merged
        self.dtype, self._store, self._is_constant_checked = merged.dtype, merged._store, merged._is_constant_checked
        return self

    def _merged(self, other: "Mask", mode: str) -> float | Tensor | Rows:
        dtype = torch.promote_types(self.dtype, other.dtype)
        if self.is_full_mask() or other.is_full_mask():
            return 1.0
        if self.is_empty_mask() or other.is_empty_mask():
            kept = self if other.is_empty_mask() else other
            if isinstance(kept._store, float):
                return kept._store
            return kept._dense().to(dtype) if isinstance(kept._store, Tensor) else rows_to(kept._rows(), dtype)
        if mode == "sparse":
            return merged_rows(rows_to(self._rows(), dtype), rows_to(other._rows(), dtype), self.shape[-1])
        return (self._dense().to(dtype) + other._dense().to(dtype)).clamp_(max=1)

    def _applied(self, x: Tensor, mode: str, apply: Any) -> Tensor:
        _check_mode(mode)
        if tuple(x.shape) != self.shape:
            raise ValueError(f"x has shape {list(x.shape)}; valid: {list(self.shape)}")
        constant = self._constant()
        if constant is not None:
            return x if constant == 1.0 else torch.zeros_like(x)
        if mode == "sparse":
            indices, _, data = self._rows()
            applied = apply(x.reshape(-1)[indices], data)
            return torch.zeros(x.numel(), dtype=applied.dtype, device=x.device).put(indices, applied).reshape(x.shape)
        value = self._dense()
        # Not a product with 0: what is not selected may be infinite.
        selected = value > 0
        return torch.where(selected, apply(x, torch.where(selected, value, 1)), 0)

    def _constant(self) -> float | None:
        """The value that all entries have, if that is 0 or 1; looked for once, when first asked."""
        if not self._is_constant_checked:
            if isinstance(self._store, Tensor):
                low, high = (float(x) for x in self._store.aminmax()) if self._store.numel() else (0.0, 0.0)
                found = low if low == high and low in (0.0, 1.0) else None
            else:
                data = self._rows().data
                all_ones = len(data) == self._dense_numel() > 0 and bool((data == 1).all())
                found = 1.0 if all_ones else 0.0 if len(data) == 0 else None
            self._store = self._store if found is None else found
            self._is_constant_checked = True
        return self._store if isinstance(self._store, float) else None

    def _dense_numel(self) -> int:
        return torch.Size(self.shape).numel()

    def _dense(self) -> Tensor:
        """The values; not to be written to, and possibly expanded."""
        if isinstance(self._store, float):
            return torch.full((), self._store, dtype=self.dtype, device=self.device).expand(self.shape)
        if isinstance(self._store, Tensor):
            return self._store
        return dense_from_rows(self._store, self.shape)

    def _rows(self) -> Rows:
        """The compressed rows; not to be written to."""
        return self._store if isinstance(self._store, Rows) else rows_from_dense(self._dense())

    def __repr__(self) -> str:
        return f"Mask(shape={self.shape}, dtype={self.dtype}, density={self.get_density():.4g})"


def rows_to(rows: Rows, dtype: torch.dtype) -> Rows:
    """The same rows with values of `dtype`."""
    return rows._replace(data=rows.data.to(dtype))


def _check_mode(mode: str) -> None:
    if mode not in ("dense", "sparse"):
        raise ValueError(f"mode={mode!r}; valid: dense, sparse")


def _check_values(name: str, values: Tensor) -> None:
    # Written so that a NaN is found: it is on neither side of a bound.
    if values.numel() and not bool(((values >= 0) & (values <= 1)).all()):
        wrong = values[~((values >= 0) & (values <= 1))]
        raise ValueError(f"{name} holds {wrong[0].item()}; valid: probabilities from 0 to 1")
