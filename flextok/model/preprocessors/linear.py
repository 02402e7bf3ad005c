"""One linear map over the last axis of every entry."""

from torch import nn

from flextok.model.data_dict import DataDict
from flextok.model.init import InitStyle, MuPInit, init_linear
from flextok.model.packed_list import PackedList
from flextok.utils.misc import get_autocast_context, str_to_dtype


class LinearLayer(MuPInit):
    """Project entries `[b, ..., dim_in]` to `[b, ..., dim]`."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim_in: int,
        dim: int,
        weight_init_style: InitStyle = "xavier",
        dtype_override: str | None = None,
        proj_bias: bool = True,
    ) -> None:
        super().__init__()
        self.read_key, self.write_key = read_key, write_key
        self.dim_in, self.dim_out = dim_in, dim
        self.dtype_override = str_to_dtype(dtype_override)
        self.weight_init_style = weight_init_style
        self.proj = nn.Linear(dim_in, dim, bias=proj_bias)
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        init_linear(self.proj, self.weight_init_style, mup=mup)

    def forward(self, data_dict: DataDict) -> DataDict:
        entries = PackedList.pack(data_dict[self.read_key])
        x = entries.tensor
        with get_autocast_context(x, self.dtype_override):
            # Without autocast the weights' dtype decides; a bfloat16 input into float32 weights must be cast.
            data_dict[self.write_key] = entries.map(lambda x: self.proj(x.to(self.proj.weight.dtype)))
        return data_dict
