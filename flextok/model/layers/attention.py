"""Attention layers: projections, head norms and scale. The mechanism itself is `flextok.attention.attend`."""

from collections.abc import Callable

from torch import Tensor, nn

from flextok.attention.engine import AttentionMask, AttentionPlan, attend
from flextok.attention.reference import ScoreMod
from flextok.model.init import InitStyle, MuPInit, init_linear
from flextok.model.layers.norm import plain_norm

RopeForward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class FlexAttention(MuPInit):
    """Multi-head attention of queries `[batch, n, dim]` over a context `[batch, m, dim]`.

    The softmax scale is `8 / head_dim` with `muP_scale`, equal to the usual `1 / sqrt(head_dim)` only at head_dim 64.
    `use_flex_attention` is accepted for published configs and has no effect: the backend follows from the mask and
    device.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        proj_drop: float = 0.0,
        qk_norm: bool = True,
        muP_scale: bool = True,
        norm_layer: Callable[[int], nn.Module] = plain_norm,
        use_flex_attention: bool = True,
        weight_init_style: InitStyle = "xavier",
        zero_init_query_proj: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.scale = 8 / head_dim if muP_scale else head_dim**-0.5
        self.weight_init_style = weight_init_style
        self.zero_init_query_proj = zero_init_query_proj
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias)
        self.q_norm = norm_layer(head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        for linear in (self.wq, self.wk, self.wv, self.proj):
            init_linear(linear, self.weight_init_style, mup=mup)
        if self.zero_init_query_proj:
            init_linear(self.wq, "zero")

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        score_mod: ScoreMod | None = None,
        block_mask: AttentionMask = None,
        rope_forward: RopeForward | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """`keep`, int64 `[kept]`: the queries whose output is wanted; None means all."""
        if keep is not None and isinstance(block_mask, AttentionPlan) and block_mask.takes_some_queries:
            x, keep = x.index_select(1, keep), None
        q, k, v = (
            linear(tokens).unflatten(-1, (self.num_heads, -1))
            for linear, tokens in ((self.wq, x), (self.wk, context), (self.wv, context))
        )
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        if rope_forward is not None:
            q, k, v = rope_forward(q, k, v)
        # Under autocast the float32 norm leaves q and k in another dtype than v.
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = attend(q, k, v, block_mask, scale=self.scale, score_mod=score_mod)
        out = out.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out if keep is None else out.index_select(1, keep)))


class FlexSelfAttention(FlexAttention):
    """`FlexAttention` of a sequence over itself."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        score_mod: ScoreMod | None = None,
        block_mask: AttentionMask = None,
        rope_forward: RopeForward | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        return super().forward(x, x, score_mod, block_mask, rope_forward, keep)


class FlexCrossAttention(FlexAttention):
    """`FlexAttention` of a sequence over a context."""
