"""Transformer blocks, plain and modulated by a time embedding (adaLN-zero, arXiv 2212.09748)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flextok.attention.engine import AttentionMask
from flextok.attention.reference import ScoreMod
from flextok.model.init import InitStyle, MuPInit, init_linear
from flextok.model.layers.attention import FlexCrossAttention, FlexSelfAttention, RopeForward
from flextok.model.layers.drop_path import DropPath
from flextok.model.layers.fused import gated_add
from flextok.model.layers.mlp import GatedMlp, Mlp
from flextok.model.layers.modulation import EmbPackingFn, modulated_norm, modulations
from flextok.model.layers.norm import plain_norm


class _Block(MuPInit):
    """What all blocks share: the arguments, the MLP and, with `_num_modulations > 0`, the adaLN projection."""

    _num_modulations = 0

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        mlp_bias: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = plain_norm,
        gated_mlp: bool = False,
        qk_norm: bool = False,
        muP_scale: bool = True,
        weight_init_style: InitStyle = "xavier",
        zero_init_query_proj: bool = False,
        adaLN_expansion: int = 1,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if num_heads is None and head_dim is None:
            raise ValueError("a block needs num_heads or head_dim, both are None")
        if head_dim is not None and dim % head_dim:
            raise ValueError(f"dim={dim} is not divisible by head_dim={head_dim}")
        self._attention_arguments: dict[str, Any] = {
            "dim": dim,
            "num_heads": num_heads or dim // (head_dim or dim),
            "qkv_bias": qkv_bias,
            "proj_bias": proj_bias,
            "proj_drop": drop,
            "qk_norm": qk_norm,
            "muP_scale": muP_scale,
            "norm_layer": norm_layer,
            "weight_init_style": weight_init_style,
            "zero_init_query_proj": zero_init_query_proj,
        }
        self._build_attention(dim, norm_layer)
        self.norm2 = norm_layer(dim)
        mlp_class: Any = GatedMlp if gated_mlp else Mlp
        self.mlp = mlp_class(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            drop=drop,
            bias=mlp_bias,
            weight_init_style=weight_init_style,
        )
        self.drop_path = DropPath(drop_path)
        if self._num_modulations:
            rows = adaLN_expansion * self._num_modulations * dim
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, rows))
            init_linear(self.adaLN_modulation[1], "zero")  # type: ignore[arg-type]

    def _build_attention(self, dim: int, norm_layer: Callable[[int], nn.Module]) -> None:
        self.norm1 = norm_layer(dim)
        self.attn = FlexSelfAttention(**self._attention_arguments)

    def _init_weights(self, *, mup: bool) -> None:
        for module in self.children():
            if isinstance(module, MuPInit):
                module._init_weights(mup=mup)
        if self._num_modulations:
            init_linear(self.adaLN_modulation[1], "zero")  # type: ignore[arg-type]


class FlexBlock(_Block):
    """Pre-norm self-attention and MLP.

    With `keep`, int64 `[kept]`, only these tokens come out; the others serve as keys and values.
    """

    def forward(
        self,
        x: Tensor,
        block_mask: AttentionMask = None,
        score_mod: ScoreMod | None = None,
        rope_forward: RopeForward | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        attended = self.attn(self.norm1(x), score_mod, block_mask, rope_forward, keep)
        x = x if keep is None else x.index_select(1, keep)
        x = x + self.drop_path(attended, block_mask, keep)
        return x + self.drop_path(self.mlp(self.norm2(x)), block_mask, keep)


class FlexBlockAdaLN(_Block):
    """`FlexBlock` whose norms are shifted and scaled, and whose branches are gated, by an embedding.

    `adaLN_expansion=e` holds one set of modulations for each of e sub-sequences.
    """

    _num_modulations = 6

    def forward(
        self,
        x: Tensor,
        adaLN_emb: Tensor,
        adaLN_packing_fn: EmbPackingFn,
        block_mask: AttentionMask = None,
        score_mod: ScoreMod | None = None,
        rope_forward: RopeForward | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        rows, index = modulations(self.adaLN_modulation, adaLN_emb, adaLN_packing_fn, x.shape[1], self._num_modulations)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = rows
        attn_in = modulated_norm(self.norm1, x, shift_attn, scale_attn, index)
        attended = self.attn(attn_in, score_mod, block_mask, rope_forward, keep)
        if keep is not None:
            x, index = x.index_select(1, keep), index.index_select(0, keep)
        x = gated_add(x, gate_attn, self.drop_path(attended, block_mask, keep), index)
        mlp_out = self.mlp(modulated_norm(self.norm2, x, shift_mlp, scale_mlp, index))
        return gated_add(x, gate_mlp, self.drop_path(mlp_out, block_mask, keep), index)


class FlexDecoderBlock(_Block):
    """Self-attention, cross-attention to a context, MLP."""

    def _build_attention(self, dim: int, norm_layer: Callable[[int], nn.Module]) -> None:
        self.norm1 = norm_layer(dim)
        self.self_attn = FlexSelfAttention(**self._attention_arguments)
        self.query_norm = norm_layer(dim)
        self.context_norm = norm_layer(dim)
        self.cross_attn = FlexCrossAttention(**self._attention_arguments)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        sa_block_mask: AttentionMask = None,
        xa_block_mask: AttentionMask = None,
        sa_score_mod: ScoreMod | None = None,
        xa_score_mod: ScoreMod | None = None,
        rope_forward: RopeForward | None = None,
    ) -> Tensor:
        attended = self.self_attn(
            self.norm1(x), score_mod=sa_score_mod, block_mask=sa_block_mask, rope_forward=rope_forward
        )
        x = x + self.drop_path(attended, sa_block_mask)
        crossed = self.cross_attn(
            self.query_norm(x), self.context_norm(context), score_mod=xa_score_mod, block_mask=xa_block_mask
        )
        x = x + self.drop_path(crossed, sa_block_mask)
        return x + self.drop_path(self.mlp(self.norm2(x)), sa_block_mask)


class FlexDecoderBlockAdaLN(FlexDecoderBlock):
    """`FlexDecoderBlock` modulated by an embedding; the context must have the padded length of the sequence."""

    _num_modulations = 11

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        adaLN_emb: Tensor,
        adaLN_packing_fn: EmbPackingFn,
        sa_block_mask: AttentionMask = None,
        xa_block_mask: AttentionMask = None,
        sa_score_mod: ScoreMod | None = None,
        xa_score_mod: ScoreMod | None = None,
        rope_forward: RopeForward | None = None,
    ) -> Tensor:
        rows, index = modulations(self.adaLN_modulation, adaLN_emb, adaLN_packing_fn, x.shape[1], self._num_modulations)
        gate_sa, gate_xa, gate_mlp, shift_sa, scale_sa, shift_q, scale_q, shift_c, scale_c, shift_mlp, scale_mlp = rows
        attended = self.self_attn(
            modulated_norm(self.norm1, x, shift_sa, scale_sa, index),
            score_mod=sa_score_mod,
            block_mask=sa_block_mask,
            rope_forward=rope_forward,
        )
        x = gated_add(x, gate_sa, self.drop_path(attended, sa_block_mask), index)
        crossed = self.cross_attn(
            modulated_norm(self.query_norm, x, shift_q, scale_q, index),
            modulated_norm(self.context_norm, context, shift_c, scale_c, index),
            score_mod=xa_score_mod,
            block_mask=xa_block_mask,
        )
        x = gated_add(x, gate_xa, self.drop_path(crossed, sa_block_mask), index)
        mlp_out = self.mlp(modulated_norm(self.norm2, x, shift_mlp, scale_mlp, index))
        return gated_add(x, gate_mlp, self.drop_path(mlp_out, sa_block_mask), index)
