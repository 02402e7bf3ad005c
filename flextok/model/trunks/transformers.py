"""Encoder and decoder trunks: a stack of blocks over the packed row."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flextok.model.data_dict import DataDict
from flextok.model.init import InitStyle, MuPInit
from flextok.model.layers.norm import plain_norm
from flextok.model.layers.transformer_blocks import (
    FlexBlock,
    FlexBlockAdaLN,
    FlexDecoderBlock,
    FlexDecoderBlockAdaLN,
)


class _Trunk(MuPInit):
    """A stack of blocks; no norm after the last one."""

    def __init__(
        self,
        block_class: Callable[..., nn.Module],
        depth: int,
        drop_path_rate: float,
        use_act_checkpoint: bool,
        intermediate_layers: Sequence[int],
        adaLN_emb_read_key: str | None,
        adaLN_packing_fn_read_key: str | None,
        **block_arguments: Any,
    ) -> None:
        super().__init__()
        if (adaLN_emb_read_key is None) != (adaLN_packing_fn_read_key is None):
            raise ValueError(
                f"adaLN_emb_read_key={adaLN_emb_read_key!r} and adaLN_packing_fn_read_key="
                f"{adaLN_packing_fn_read_key!r} belong together: give both or neither"
            )
        beyond = [layer for layer in intermediate_layers if not 0 <= layer < depth]
        if beyond:
            raise ValueError(f"intermediate_layers {beyond} do not exist in a trunk of depth {depth}")
        rates = torch.linspace(0.0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(block_class(drop_path=rate, **block_arguments) for rate in rates)
        self.adaLN_emb_read_key = adaLN_emb_read_key
        self.adaLN_packing_fn_read_key = adaLN_packing_fn_read_key
        self.use_act_checkpoint = use_act_checkpoint
        self.intermediate_layers = list(intermediate_layers)

    @property
    def _modulation_keys(self) -> list[str]:
        return [key for key in (self.adaLN_emb_read_key, self.adaLN_packing_fn_read_key) if key is not None]

    def _init_weights(self, *, mup: bool) -> None:
        for block in self.blocks:
            block._init_weights(mup=mup)  # type: ignore[operator]

    def _run(self, x: Tensor, *inputs: Any, **shared: Any) -> tuple[Tensor, list[Tensor]]:
        """The last block's output and those of `intermediate_layers`."""
        intermediate = []
        for index, block in enumerate(self.blocks):
            if self.use_act_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, *inputs, use_reentrant=False, **shared)
            else:
                x = block(x, *inputs, **shared)
            if index in self.intermediate_layers:
                intermediate.append(x)
        return x, intermediate

    def _write(
        self, data_dict: DataDict, key: str, intermediate_key: str | None, *inputs: Any, **shared: Any
    ) -> DataDict:
        data_dict[key], intermediate = self._run(*inputs, **shared)
        if intermediate_key is not None:
            data_dict[intermediate_key] = intermediate[0] if len(intermediate) == 1 else intermediate
        return data_dict


def _optional(data_dict: DataDict, key: str | None) -> Any:
    return None if key is None else data_dict[key]


class FlexTransformer(_Trunk):
    """Self-attention trunk over `[1, tokens, dim]`; with `adaLN_emb_read_key`, modulated by a time embedding.

    `intermediate_layer_write_key` receives the outputs of `intermediate_layers`: a list, or the tensor itself if
    there is one. `use_act_checkpoint` recomputes each block in the backward pass and does not change state-dict
    names.
    """

    def __init__(
        self,
        input_seq_read_key: str,
        output_seq_write_key: str,
        dim: int = 768,
        depth: int = 12,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        mlp_bias: bool = False,
        drop: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        norm_layer: Callable[[int], nn.Module] = plain_norm,
        gated_mlp: bool = True,
        qk_norm: bool = True,
        use_act_checkpoint: bool = False,
        weight_init_style: InitStyle = "xavier",
        zero_init_query_proj: bool = False,
        block_mask_read_key: str | None = None,
        score_mod_read_key: str | None = None,
        adaLN_emb_read_key: str | None = None,
        adaLN_packing_fn_read_key: str | None = None,
        adaLN_expansion: int = 1,
        rope_forward_read_key: str | None = None,
        intermediate_layer_write_key: str | None = None,
        intermediate_layers: Sequence[int] = (),
    ) -> None:
        super().__init__(
            FlexBlock if adaLN_emb_read_key is None else FlexBlockAdaLN,
            depth,
            drop_path_rate,
            use_act_checkpoint,
            intermediate_layers,
            adaLN_emb_read_key,
            adaLN_packing_fn_read_key,
            dim=dim,
            head_dim=head_dim,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            mlp_bias=mlp_bias,
            drop=drop,
            act_layer=act_layer,
            norm_layer=norm_layer,
            gated_mlp=gated_mlp,
            qk_norm=qk_norm,
            weight_init_style=weight_init_style,
            zero_init_query_proj=zero_init_query_proj,
            adaLN_expansion=adaLN_expansion,
        )
        self.input_seq_read_key = input_seq_read_key
        self.output_seq_write_key = output_seq_write_key
        self.block_mask_read_key = block_mask_read_key
        self.score_mod_read_key = score_mod_read_key
        self.rope_forward_read_key = rope_forward_read_key
        self.intermediate_layer_write_key = intermediate_layer_write_key

    def forward(self, data_dict: DataDict) -> DataDict:
        modulation = [data_dict[key] for key in self._modulation_keys]
        return self._write(
            data_dict,
            self.output_seq_write_key,
            self.intermediate_layer_write_key,
            data_dict[self.input_seq_read_key],
            *modulation,
            block_mask=_optional(data_dict, self.block_mask_read_key),
            score_mod=_optional(data_dict, self.score_mod_read_key),
            rope_forward=_optional(data_dict, self.rope_forward_read_key),
        )


class FlexTransformerDecoder(_Trunk):
    """Trunk whose blocks self-attend, cross-attend to a context `[1, m, dim]`, then apply the MLP."""

    def __init__(
        self,
        input_seq_read_key: str,
        context_seq_read_key: str,
        output_seq_write_key: str,
        dim: int = 768,
        depth: int = 12,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        mlp_bias: bool = False,
        drop: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        norm_layer: Callable[[int], nn.Module] = plain_norm,
        gated_mlp: bool = True,
        qk_norm: bool = True,
        use_act_checkpoint: bool = False,
        weight_init_style: InitStyle = "xavier",
        zero_init_query_proj: bool = False,
        sa_block_mask_read_key: str | None = None,
        xa_block_mask_read_key: str | None = None,
        sa_score_mod_read_key: str | None = None,
        xa_score_mod_read_key: str | None = None,
        adaLN_emb_read_key: str | None = None,
        adaLN_packing_fn_read_key: str | None = None,
        adaLN_expansion: int = 1,
        rope_forward_read_key: str | None = None,
        intermediate_layer_write_key: str | None = None,
        intermediate_layers: Sequence[int] = (),
    ) -> None:
        super().__init__(
            FlexDecoderBlock if adaLN_emb_read_key is None else FlexDecoderBlockAdaLN,
            depth,
            drop_path_rate,
            use_act_checkpoint,
            intermediate_layers,
            adaLN_emb_read_key,
            adaLN_packing_fn_read_key,
            dim=dim,
            head_dim=head_dim,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            mlp_bias=mlp_bias,
            drop=drop,
            act_layer=act_layer,
            norm_layer=norm_layer,
            gated_mlp=gated_mlp,
            qk_norm=qk_norm,
            weight_init_style=weight_init_style,
            zero_init_query_proj=zero_init_query_proj,
            adaLN_expansion=adaLN_expansion,
        )
        self.input_seq_read_key = input_seq_read_key
        self.context_seq_read_key = context_seq_read_key
        self.output_seq_write_key = output_seq_write_key
        self.sa_block_mask_read_key = sa_block_mask_read_key
        self.xa_block_mask_read_key = xa_block_mask_read_key
        self.sa_score_mod_read_key = sa_score_mod_read_key
        self.xa_score_mod_read_key = xa_score_mod_read_key
        self.rope_forward_read_key = rope_forward_read_key
        self.intermediate_layer_write_key = intermediate_layer_write_key

    def forward(self, data_dict: DataDict) -> DataDict:
        keys = [self.input_seq_read_key, self.context_seq_read_key, *self._modulation_keys]
        inputs = [data_dict[key] for key in keys]
        return self._write(
            data_dict,
            self.output_seq_write_key,
            self.intermediate_layer_write_key,
            *inputs,
            sa_block_mask=_optional(data_dict, self.sa_block_mask_read_key),
            xa_block_mask=_optional(data_dict, self.xa_block_mask_read_key),
            sa_score_mod=_optional(data_dict, self.sa_score_mod_read_key),
            xa_score_mod=_optional(data_dict, self.xa_score_mod_read_key),
            rope_forward=_optional(data_dict, self.rope_forward_read_key),
        )
