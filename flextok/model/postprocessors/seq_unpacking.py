"""A packed row back to the sub-sequences of each sample."""

from collections.abc import Sequence

from torch import Tensor, nn

from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList
from flextok.model.packed_shapes import PackedShapes


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
        if not isinstance(shapes, PackedShapes):
            shapes = PackedShapes(shapes)
        if not shapes.is_plain:
            for j, key in enumerate(self.inner_seq_write_keys):
                data_dict[key] = shapes.restore(j, row.squeeze(0))
            return data_dict
        tokens = row.squeeze(0)[: sum(map(sum, shapes.lengths))]
        parts = tokens.unflatten(0, (len(shapes), -1)).split(shapes.lengths[0], dim=1)
        for key, part, shape in zip(self.inner_seq_write_keys, parts, shapes[0], strict=True):
            data_dict[key] = PackedList(part.unflatten(1, shape) if len(shape) != 1 else part)
        return data_dict
