"""Learned register tokens, the 1D queries that become the image's tokens."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.model.draw import draw_uniform
from flextok.model.init import MuPInit, init_token
from flextok.model.packed_list import PackedList


def is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, 8, ..."""
    return n > 0 and n & (n - 1) == 0


def powers_of_two(lo: int, hi: int) -> list[int]:
    """All powers of two from `lo` to `hi`, both of which must be powers of two."""
    if not (is_power_of_two(lo) and is_power_of_two(hi)) or lo > hi:
        raise ValueError(f"n_min={lo} and n_max={hi} must be powers of two in rising order")
    return [2**exponent for exponent in range(lo.bit_length() - 1, hi.bit_length())]


def _valid_sizes(mode: str, n_min: int, n_max: int) -> list[int]:
    if mode == "uniform":
        return list(range(n_min, n_max + 1))
    if mode == "powers_of_two":
        return powers_of_two(n_min, n_max)
    if mode.startswith("k="):
        return [int(size) for size in mode.removeprefix("k=").split("-")]
    raise ValueError(
        f"size_sampling_mode={mode!r} is unknown; valid: uniform, powers_of_two, or a list such as k=1-2-4"
    )


class Registers1D(MuPInit):
    """Write `[b, size, dim]` registers for each entry, b its leading axis.

    Sizes are read from the dictionary if they are there; else drawn from `valid_sizes` (training) or `n_eval`
    (evaluation), and written back. `nested` takes the first rows of the table, `avg_pool` pools it to the size.
    """

    def __init__(
        self,
        input_tensor_list_read_key: str,
        register_sizes_read_write_key: str,
        registers_write_key: str,
        dim: int,
        n_min: int,
        n_max: int,
        n_eval: int | None = None,
        size_sampling_mode: str = "uniform",
        ordering_mode: Literal["nested", "avg_pool"] = "nested",
        extra_registers_write_key: str | None = None,
        extra_registers_dim: int | None = None,
    ) -> None:
        super().__init__()
        if ordering_mode not in ("nested", "avg_pool"):
            raise ValueError(f"ordering_mode={ordering_mode!r} is unknown; valid: nested, avg_pool")
        self.input_tensor_list_read_key = input_tensor_list_read_key
        self.register_sizes_read_write_key = register_sizes_read_write_key
        self.registers_write_key = registers_write_key
        self.extra_registers_write_key = extra_registers_write_key
        self.n_min, self.n_max = n_min, n_max
        self.n_eval = n_max if n_eval is None else n_eval
        self.ordering_mode = ordering_mode
        self.valid_sizes = _valid_sizes(size_sampling_mode, n_min, n_max)
        self.registers = nn.Parameter(torch.empty(n_max, dim))
        if extra_registers_write_key is not None:
            extra_dim = dim if extra_registers_dim is None else extra_registers_dim
            self.extra_registers = nn.Parameter(torch.empty(n_max, extra_dim))
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        init_token(self.registers)
        if self.extra_registers_write_key is not None:
            init_token(self.extra_registers)

    def _sizes(self, data_dict: DataDict, batch: int) -> list[int]:
        if self.register_sizes_read_write_key in data_dict:
            return data_dict[self.register_sizes_read_write_key]
        if not self.training or len(self.valid_sizes) == 1:
            return [self.n_eval if not self.training else self.valid_sizes[0]] * batch
        picks = draw_uniform((batch,), data_dict.get(RNG_KEY), "cpu") * len(self.valid_sizes)
        return [self.valid_sizes[pick] for pick in picks.long().tolist()]

    def _take(self, table: Tensor, size: int) -> Tensor:
        if self.ordering_mode == "nested":
            return table[:size]
        return F.adaptive_avg_pool1d(table.T[None], size)[0].T

    def _registers(self, table: Tensor, sizes: list[int], batches: list[int]) -> PackedList:
        if set(batches) == {1} and len(set(sizes)) == 1:
            return PackedList(self._take(table, sizes[0]).expand(len(sizes), -1, -1))
        pairs = zip(sizes, batches, strict=True)
        return PackedList.pack([self._take(table, size).expand(batch, -1, -1) for size, batch in pairs])

    def forward(self, data_dict: DataDict) -> DataDict:
        entries = data_dict[self.input_tensor_list_read_key]
        sizes = self._sizes(data_dict, len(entries))
        if isinstance(entries, PackedList):
            batches = [shape[0] for shape in entries.shapes]
        else:
            batches = [entry.shape[0] for entry in entries]
        data_dict[self.register_sizes_read_write_key] = sizes
        data_dict[self.registers_write_key] = self._registers(self.registers, sizes, batches)
        if self.extra_registers_write_key is not None:
            data_dict[self.extra_registers_write_key] = self._registers(self.extra_registers, sizes, batches)
        return data_dict
