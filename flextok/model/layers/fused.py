"""Elementwise expressions that keep less for the backward pass than torch would: inputs, and no intermediate results.

Each is one `autograd.Function` of plain tensor operations, so that it runs everywhere, and a compiler may fuse it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate) * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """`silu(gate) * value`; the backward pass computes silu again."""
    return _SwiGLU.apply(gate, value)


def _sum_rows(per_token: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """`[1, tokens, width]` added up to `[rows, width]`, in float32."""
    sums = per_token.new_zeros(num_rows, per_token.shape[-1], dtype=torch.float32)
    return sums.index_add_(0, index, per_token[0].float())


class _NormModulate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normed, mean, rstd = torch.native_layer_norm(wide, (x.shape[-1],), None, None, eps)
        ctx.save_for_backward(x, mean, rstd, scale, index)
        normed = normed.to(x.dtype)
        return normed * (1 + scale).index_select(0, index) + shift.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, index = ctx.saved_tensors
        wide = x.float()
        normed = ((wide - mean) * rstd).to(grad.dtype)
        rows = scale.shape[0]
        grad_scale, grad_shift = _sum_rows(grad * normed, index, rows), _sum_rows(grad, index, rows)
        grad_normed = (grad * (1 + scale).index_select(0, index)).float()
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normed, wide, (x.shape[-1],), mean, rstd, None, None, [True, False, False]
        )
        return grad_x.to(x.dtype), grad_shift.to(scale.dtype), grad_scale.to(scale.dtype), None, None


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale[index]) + shift[index]`, the norm in float32 and without parameters.

    Args:
        x: `[1, tokens, width]`.
        shift: `[rows, width]`, like `scale`.
        index: int64 `[tokens]`: the row that modulates each token.
    """
    return _NormModulate.apply(x, shift, scale, index, eps)


class _GatedAdd(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(gate, branch, index)
        return x + gate.index_select(0, index) * branch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch, index = ctx.saved_tensors
        grad_gate = _sum_rows(grad * branch, index, gate.shape[0]).to(gate.dtype)
        grad_branch = (grad * gate.index_select(0, index)).to(branch.dtype)
        return grad, grad_gate, grad_branch, None


def gated_add(x: Tensor, gate: Tensor, branch: Tensor, index: Tensor) -> Tensor:
    """`x + gate[index] * branch`; x and branch `[1, tokens, width]`, gate `[rows, width]`, index int64 `[tokens]`."""
    return _GatedAdd.apply(x, gate, branch, index)
