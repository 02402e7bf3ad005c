"""Output heads: a linear map, a linear map back to pixels of patches, an MLP."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from flextok.model.data_dict import DataDict
from flextok.model.init import InitStyle, MuPInit, init_linear
from flextok.model.layers.modulation import modulate, per_sample
from flextok.model.layers.mup_readout import MuReadoutFSDP
from flextok.model.layers.norm import plain_norm
from flextok.model.packed_list import PackedList
from flextok.utils.misc import get_autocast_context, str_to_dtype

NormLayer = Callable[[int], nn.Module] | None


def _readout(dim: int, dim_out: int, *, use_mup: bool, bias: bool) -> nn.Linear:
    return MuReadoutFSDP(dim, dim_out, bias=bias) if use_mup else nn.Linear(dim, dim_out, bias=bias)


def unpatchify(x: Tensor, patch_sizes: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: `[batch, n1 .. nN, p1 * .. * channels]` -> `[batch, n1 p1 .. nN pN, channels]`."""
    axes = range(len(patch_sizes))
    grid, cell = " ".join(f"n{i}" for i in axes), " ".join(f"p{i}" for i in axes)
    joined = " ".join(f"(n{i} p{i})" for i in axes)
    return rearrange(x, f"b {grid} ({cell} d) -> b {joined} d", **{f"p{i}": p for i, p in enumerate(patch_sizes)})


class LinearHead(MuPInit):
    """`proj(norm(x))` of entries `[1, ..., dim]`, the norm shifted and scaled by an embedding if a key is given."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        dim_out: int,
        use_mup_readout: bool,
        weight_init_style: InitStyle = "zero",
        norm_layer: NormLayer = plain_norm,
        dtype_override: str | None = None,
        adaLN_emb_read_key: str | None = None,
        adaLN_packing_fn_read_key: str | None = None,
        adaLN_bias: bool = True,
        proj_bias: bool = True,
    ) -> None:
        super().__init__()
        self.read_key, self.write_key = read_key, write_key
        self.dim_in, self.dim_out = dim, dim_out
        self.adaLN_emb_read_key = adaLN_emb_read_key
        self.adaLN_packing_fn_read_key = adaLN_packing_fn_read_key
        self.dtype_override = str_to_dtype(dtype_override)
        self.weight_init_style = weight_init_style
        self.norm = nn.Identity() if norm_layer is None else norm_layer(dim)
        self.proj = _readout(dim, dim_out, use_mup=use_mup_readout, bias=proj_bias)
        if adaLN_emb_read_key is not None:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, bias=adaLN_bias))
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        init_linear(self.proj, self.weight_init_style, mup=mup)
        if self.adaLN_emb_read_key is not None:
            init_linear(self.adaLN_modulation[1], "zero")  # type: ignore[arg-type]

    def _modulation(self, emb: Tensor, entries: PackedList, data_dict: DataDict) -> tuple[Tensor, Tensor]:
        """Shift and scale that broadcast over `entries.tensor`."""
        rows = per_sample(self.adaLN_modulation, emb)
        if self.adaLN_packing_fn_read_key is None:
            rows = entries.repeat_rows(rows)
        else:
            rows = data_dict[self.adaLN_packing_fn_read_key](rows).reshape(*entries.tensor.shape[:-1], -1)
        shift, scale = rows.chunk(2, dim=-1)
        return shift, scale

    def _project(self, data_dict: DataDict) -> PackedList:
        entries = PackedList.pack(data_dict[self.read_key])
        with get_autocast_context(entries.tensor, self.dtype_override):
            entries = entries.map(lambda x: self.norm(x.to(self.proj.weight.dtype)))
            if self.adaLN_emb_read_key is not None:
                shift, scale = self._modulation(data_dict[self.adaLN_emb_read_key], entries, data_dict)
                entries = entries.map(lambda x: modulate(x, shift, scale))
            return entries.map(self.proj)

    def forward(self, data_dict: DataDict) -> DataDict:
        data_dict[self.write_key] = self._project(data_dict)
        return data_dict


class ToPatchesLinearHead(LinearHead):
    """`LinearHead` from patches `[1, n1 .. nN, dim]` to `[1, n1 p1 .. nN pN, channels_out]`; the rest as there."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        channels_out: int,
        patch_sizes: Sequence[int],
        use_mup_readout: bool,
        **head_arguments: Any,
    ) -> None:
        dim_out = channels_out * prod(patch_sizes)
        super().__init__(read_key, write_key, dim, dim_out, use_mup_readout, **head_arguments)
        self.patch_sizes = list(patch_sizes)

    def forward(self, data_dict: DataDict) -> DataDict:
        patches = self._project(data_dict)
        if patches.is_uniform:
            data_dict[self.write_key] = PackedList(unpatchify(patches.tensor, self.patch_sizes))
        else:
            data_dict[self.write_key] = [unpatchify(entry, self.patch_sizes) for entry in patches]
        return data_dict


class MLPHead(MuPInit):
    """Norm, `num_layers - 1` hidden layers of width `int(dim_hidden_ratio * dim)`, and an output projection."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        dim_out: int,
        num_layers: int,
        use_mup_readout: bool,
        dim_hidden_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        weight_init_style: InitStyle = "xavier",
        zero_init_out_proj: bool = True,
        norm_layer: NormLayer = plain_norm,
        dtype_override: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.read_key, self.write_key = read_key, write_key
        self.dim_in, self.dim_out = dim, dim_out
        self.dtype_override = str_to_dtype(dtype_override)
        self.weight_init_style = weight_init_style
        self.zero_init_out_proj = zero_init_out_proj
        hidden = int(dim_hidden_ratio * dim)
        layers: list[nn.Module] = [] if norm_layer is None else [norm_layer(dim)]
        for index in range(num_layers - 1):
            layers += [nn.Linear(dim if index == 0 else hidden, hidden, bias=bias), act_layer()]
        self.mlp = nn.Sequential(*layers)
        self.out_proj = _readout(hidden if num_layers > 1 else dim, dim_out, use_mup=use_mup_readout, bias=bias)
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                init_linear(layer, self.weight_init_style, mup=mup)
        init_linear(self.out_proj, "zero" if self.zero_init_out_proj else self.weight_init_style, mup=mup)

    def forward(self, data_dict: DataDict) -> DataDict:
        entries = PackedList.pack(data_dict[self.read_key])
        with get_autocast_context(entries.tensor, self.dtype_override):
            data_dict[self.write_key] = entries.map(lambda x: self.out_proj(self.mlp(x.to(self.out_proj.weight.dtype))))
        return data_dict
