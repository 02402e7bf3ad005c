"""Elementwise expressions that keep less for the backward pass than torch would: inputs, and no intermediate results.

Each is one `autograd.Function` of plain tensor operations, so that it runs everywhere, and a compiler may fuse it. They
write into their own temporaries: on a CPU fresh memory costs as much as the arithmetic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, value = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, value = both.chunk(2, dim=-1)
        grad_both = torch.empty_like(both)
        grad_gate, grad_value = grad_both.chunk(2, dim=-1)
        torch.mul(grad, value, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_value)
        grad_value.mul_(grad)
        return grad_both


def swiglu(both: Tensor) -> Tensor:
    """`silu(gate) * value` of `both` = `[..., gate | value]`; the backward pass computes silu again."""
    return _SwiGLU.apply(both)


def _sum_rows(per_token: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """`[1, tokens, width]` added up to `[rows, width]`, in float32."""
    sums = per_token.new_zeros(num_rows, per_token.shape[-1], dtype=torch.float32)
    return sums.index_add_(0, index, per_token[0].float())


class _NormModulate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x.float(), (x.shape[-1],), None, None, eps)
        ctx.save_for_backward(x, mean, rstd, scale, index)
        out = normed.to(x.dtype) * (1 + scale).index_select(0, index)
        return out.add_(shift.index_select(0, index))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, index = ctx.saved_tensors
        rows, wide = scale.shape[0], x.float()
        normed = (wide - mean).mul_(rstd)
        grad_scale, grad_shift = _sum_rows(normed.mul_(grad), index, rows), _sum_rows(grad, index, rows)
        grad_normed = (1 + scale).index_select(0, index).float() * grad.float()
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
        return x + gate.index_select(0, index).mul_(branch[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch, index = ctx.saved_tensors
        grad_gate = _sum_rows(grad * branch, index, gate.shape[0]).to(gate.dtype)
        return grad, grad_gate, (gate.index_select(0, index) * grad).to(branch.dtype), None


def gated_add(x: Tensor, gate: Tensor, branch: Tensor, index: Tensor) -> Tensor:
    """`x + gate[index] * branch`; x and branch `[1, tokens, width]`, gate `[rows, width]`, index int64 `[tokens]`."""
    return _GatedAdd.apply(x, gate, branch, index)


def joined_linear(x: Tensor, *linears: nn.Linear) -> Tensor:
    """The outputs of several linear maps of x side by side, in one product.

    The weights are joined anew in each call: cheap beside the product, and right whatever has changed them.
    """
    weight = torch.cat([linear.weight for linear in linears])
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return F.linear(x, weight, torch.cat(biases) if biases else None)


def can_join(*linears: nn.Module) -> bool:
    """Whether all are plain linear maps, not wrapped or replaced, and all or none has a bias."""
    return (
        all(type(linear) is nn.Linear for linear in linears) and len({linear.bias is None for linear in linears}) == 1
    )
