"""Encoder and decoder trunks: a stack of blocks over the packed row."""

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flextok.attention.engine import AttentionPlan, AttentionRequest, BackendChoice, plan_attention
from flextok.attention.layout import SequenceLayout
from flextok.attention.reference import ScoreMod
from flextok.model.data_dict import DataDict
from flextok.model.init import InitStyle, MuPInit
from flextok.model.layers.fused import compute_dtype
from flextok.model.layers.norm import plain_norm
from flextok.model.layers.transformer_blocks import (
    FlexBlock,
    FlexBlockAdaLN,
    FlexDecoderBlock,
    FlexDecoderBlockAdaLN,
)

if TYPE_CHECKING:
    from flextok.model.sparse_attention import TrunkSparsity


class _Trunk(MuPInit):
    """A stack of blocks; no norm after the last one. The arguments here are those of both trunks.

    With `adaLN_emb_read_key` the blocks are modulated by a time embedding, spread over the tokens by the function
    under `adaLN_packing_fn_read_key`. `intermediate_layer_write_key` receives the outputs of `intermediate_layers`: a
    list, or the tensor itself if there is one. `use_act_checkpoint` recomputes each block in the backward pass; it does
    not change state-dict names.
    """

    _plain_block: Callable[..., nn.Module]
    _modulated_block: Callable[..., nn.Module]

    def __init__(
        self,
        *,
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
        adaLN_emb_read_key: str | None = None,
        adaLN_packing_fn_read_key: str | None = None,
        adaLN_expansion: int = 1,
        rope_forward_read_key: str | None = None,
        intermediate_layer_write_key: str | None = None,
        intermediate_layers: Sequence[int] = (),
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
        block = type(self)._plain_block if adaLN_emb_read_key is None else type(self)._modulated_block
        self.blocks = nn.ModuleList(
            block(
                dim=dim,
                head_dim=head_dim,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                mlp_bias=mlp_bias,
                drop=drop,
                drop_path=drop_path_rate * index / max(depth - 1, 1),
                act_layer=act_layer,
                norm_layer=norm_layer,
                gated_mlp=gated_mlp,
                qk_norm=qk_norm,
                weight_init_style=weight_init_style,
                zero_init_query_proj=zero_init_query_proj,
                adaLN_expansion=adaLN_expansion,
            )
            for index in range(depth)
        )
        self.output_seq_write_key = output_seq_write_key
        self.adaLN_emb_read_key = adaLN_emb_read_key
        self.adaLN_packing_fn_read_key = adaLN_packing_fn_read_key
        self.rope_forward_read_key = rope_forward_read_key
        self.intermediate_layer_write_key = intermediate_layer_write_key
        self.intermediate_layers = list(intermediate_layers)
        self.use_act_checkpoint = use_act_checkpoint
        self.attention_backend: BackendChoice = "auto"
        self.sparsity: TrunkSparsity | None = None

    def _init_weights(self, *, mup: bool) -> None:
        for block in self.blocks:
            block._init_weights(mup=mup)  # type: ignore[operator]

    def _run(
        self,
        data_dict: DataDict,
        input_keys: Sequence[str],
        optional_keys: dict[str, str | None],
        output_subsequences: Sequence[int] | None = None,
    ) -> DataDict:
        """Run the blocks on the sequences under `input_keys`, the first of which they transform.

        `optional_keys` maps an argument of the blocks to the key of its value, None where there is none. With
        `output_subsequences` the last block leaves the tokens of all others at zero.
        """
        modulation_keys = [self.adaLN_emb_read_key, self.adaLN_packing_fn_read_key]
        x, *inputs = (data_dict[key] for key in [*input_keys, *modulation_keys] if key is not None)
        optional = {name: data_dict[key] for name, key in optional_keys.items() if key is not None}
        sparse_plan_of, own = None, "block_mask" if "block_mask" in optional_keys else "sa_block_mask"
        for name, value in list(optional.items()):
            if isinstance(value, SequenceLayout):
                score_mod = optional.pop(name.replace("block_mask", "score_mod"), None)
                request = self._request(value, x, score_mod)
                optional[name] = plan_attention(request, self.attention_backend)
                if self.sparsity is not None and name == own:
                    sparse_plan_of = self.sparsity.plans(request, optional[name], data_dict, self.attention_backend)
        if self.sparsity is not None and sparse_plan_of is None:
            raise ValueError("sparse attention needs the layout of the packed row; this packer writes none")
        intermediate: list[Tensor] = []
        length, keep = x.shape[1], None
        for index, block in enumerate(self.blocks):
            if sparse_plan_of is not None:
                optional[own] = sparse_plan_of(index)
            if output_subsequences is not None and index == len(self.blocks) - 1:
                plan: AttentionPlan = optional["block_mask"]
                assert plan.layout is not None
                keep = plan.layout.rows_of(output_subsequences, x.device)
                if self.rope_forward_read_key is None:  # It rotates queries by their place in the whole row.
                    plan = plan.for_queries_of(output_subsequences)
                optional |= {"block_mask": plan, "keep": keep}
            if self.use_act_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, *inputs, use_reentrant=False, **optional)
            else:
                x = block(x, *inputs, **optional)
            if index in self.intermediate_layers:
                intermediate.append(x)
        if keep is not None:
            x = x.new_zeros(1, length, x.shape[-1]).index_copy(1, keep, x)
        data_dict[self.output_seq_write_key] = x
        if self.intermediate_layer_write_key is not None:
            data_dict[self.intermediate_layer_write_key] = intermediate[0] if len(intermediate) == 1 else intermediate
        return data_dict

    def _request(self, layout: SequenceLayout, x: Tensor, score_mod: ScoreMod | None) -> AttentionRequest:
        """Attention over the row x `[1, tokens, dim]`, the same for all blocks."""
        if layout.last_counts is not None and (self.rope_forward_read_key or score_mod is not None):
            raise ValueError(
                "rope_forward and score_mod tell equal tokens apart, of which the packer left one; "
                "set shortens_rows=False on the packer"
            )
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        return AttentionRequest(layout, x.shape[1], x.shape[1], x.device, compute_dtype(x), needs_grad, score_mod)


def set_attention_backend(model: nn.Module, backend: BackendChoice) -> None:
    """Let all trunks inside `model` answer attention with one backend; `auto` chooses by device, dtype and mask.

    Whether it can is known when it is called: an impossible choice raises ValueError then.
    """
    if backend not in get_args(BackendChoice):
        raise ValueError(f"attention.backend={backend!r} is unknown; valid: {', '.join(get_args(BackendChoice))}")
    for trunk in trunks_of(model):
        trunk.attention_backend = backend


def trunks_of(model: nn.Module) -> Iterator["_Trunk"]:
    """All trunks inside `model`."""
    for module in model.modules():
        if isinstance(module, _Trunk):
            yield module


def trunk_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all trunks inside `model`."""
    for trunk in trunks_of(model):
        yield from trunk.blocks


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile the blocks of all trunks inside `model`, each region alike, for rows of any length.

    Packing and everything else that depends on the batch stays outside: what remains to be compiled anew are the few
    kinds of attention plans, with and without gradients. State-dict names do not change. `options` are those of
    `torch.compile`.
    """
    options.setdefault("dynamic", True)
    if "recompile_limit" in signature(torch.compile).parameters:  # torch 2.11 does not have it
        options.setdefault("recompile_limit", 16)
    for block in trunk_blocks(model):
        block.compile(**options)


class FlexTransformer(_Trunk):
    """Self-attention trunk over `[1, tokens, dim]`; `trunk_arguments` are those of `_Trunk`.

    `output_subsequences` (ours, not in published configs) lists the sub-sequences of the packed row whose outputs are
    read: in the last block the others are keys and values only, and come out as zeros. None means all. It needs the
    layout of the row under `block_mask_read_key`.
    """

    _plain_block = FlexBlock
    _modulated_block = FlexBlockAdaLN

    def __init__(
        self,
        input_seq_read_key: str,
        output_seq_write_key: str,
        *,
        block_mask_read_key: str | None = None,
        score_mod_read_key: str | None = None,
        output_subsequences: Sequence[int] | None = None,
        **trunk_arguments: Any,
    ) -> None:
        super().__init__(output_seq_write_key=output_seq_write_key, **trunk_arguments)
        self.input_seq_read_key = input_seq_read_key
        self.block_mask_read_key = block_mask_read_key
        self.score_mod_read_key = score_mod_read_key
        self.output_subsequences = output_subsequences

    def _outputs_read(self, data_dict: DataDict) -> Sequence[int] | None:
        layout = None if self.block_mask_read_key is None else data_dict[self.block_mask_read_key]
        last_is_read = len(self.blocks) - 1 in self.intermediate_layers
        return None if last_is_read or not isinstance(layout, SequenceLayout) else self.output_subsequences

    def forward(self, data_dict: DataDict) -> DataDict:
        optional = {
            "block_mask": self.block_mask_read_key,
            "score_mod": self.score_mod_read_key,
            "rope_forward": self.rope_forward_read_key,
        }
        return self._run(data_dict, [self.input_seq_read_key], optional, self._outputs_read(data_dict))


class FlexTransformerDecoder(_Trunk):
    """Trunk whose blocks self-attend, cross-attend to a context `[1, m, dim]`, then apply the MLP.

    `trunk_arguments` are those of `_Trunk`.
    """

    _plain_block = FlexDecoderBlock
    _modulated_block = FlexDecoderBlockAdaLN

    def __init__(
        self,
        input_seq_read_key: str,
        context_seq_read_key: str,
        output_seq_write_key: str,
        *,
        sa_block_mask_read_key: str | None = None,
        xa_block_mask_read_key: str | None = None,
        sa_score_mod_read_key: str | None = None,
        xa_score_mod_read_key: str | None = None,
        **trunk_arguments: Any,
    ) -> None:
        super().__init__(output_seq_write_key=output_seq_write_key, **trunk_arguments)
        self.input_seq_read_key = input_seq_read_key
        self.context_seq_read_key = context_seq_read_key
        self.sa_block_mask_read_key = sa_block_mask_read_key
        self.xa_block_mask_read_key = xa_block_mask_read_key
        self.sa_score_mod_read_key = sa_score_mod_read_key
        self.xa_score_mod_read_key = xa_score_mod_read_key

    def forward(self, data_dict: DataDict) -> DataDict:
        optional = {
            "sa_block_mask": self.sa_block_mask_read_key,
            "xa_block_mask": self.xa_block_mask_read_key,
            "sa_score_mod": self.sa_score_mod_read_key,
            "xa_score_mod": self.xa_score_mod_read_key,
            "rope_forward": self.rope_forward_read_key,
        }
        return self._run(data_dict, [self.input_seq_read_key, self.context_seq_read_key], optional)
