"""A packed row back to the sub-sequences of each sample."""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList
from flextok.model.preprocessors.flex_seq_packing import CutShape


class SequenceUnpacker(nn.Module):
    """Undo a packer: drop the padding and write sub-sequence j of each sample, `[1, *shape, width]`, under key j."""

    def __init__(
        self,
        packed_seq_read_key: str,
        inner_seq_write_keys: Sequence[str],
        inner_packed_shapes_read_key: str,
        outer_packed_shapes_read_key: str,
    ) -> None:
        super().__init__()
        self.packed_seq_read_key = packed_seq_read_key
        self.inner_seq_write_keys = list(inner_seq_write_keys)
        self.inner_packed_shapes_read_key = inner_packed_shapes_read_key
        self.outer_packed_shapes_read_key = outer_packed_shapes_read_key

    def forward(self, data_dict: DataDict) -> DataDict:
        row: Tensor = data_dict[self.packed_seq_read_key]
        shapes = data_dict[self.inner_packed_shapes_read_key]
        if any(len(sample) != len(self.inner_seq_write_keys) for sample in shapes):
            raise ValueError(f"{len(shapes[0])} sub-sequences were packed, the keys are {self.inner_seq_write_keys}")
        num_tokens = sum(prod(shape) for sample in shapes for shape in sample)
        tokens = row[0, :num_tokens]
        if all(sample == shapes[0] for sample in shapes) and not isinstance(shapes[0][-1], CutShape):
            parts = tokens.unflatten(0, (len(shapes), -1)).split([prod(shape) for shape in shapes[0]], dim=1)
            for key, part, shape in zip(self.inner_seq_write_keys, parts, shapes[0], strict=True):
                data_dict[key] = PackedList(part.unflatten(1, shape) if len(shape) != 1 else part)
            return data_dict
        parts = tokens.split([prod(shape) for sample in shapes for shape in sample])
        for j, key in enumerate(self.inner_seq_write_keys):
            mine = zip(parts[j :: len(self.inner_seq_write_keys)], shapes, strict=True)
            data_dict[key] = PackedList.pack([_restore(part, sample[j]) for part, sample in mine])
        return data_dict


def _restore(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """`[n, width]` -> `[1, *shape, width]`, with zeros for tokens that were not packed."""
    if isinstance(shape, CutShape):
        tokens = F.pad(tokens, (0, 0, 0, shape.full[0] - shape[0]))
        shape = shape.full
    return tokens.view(1, *shape, tokens.shape[-1])
