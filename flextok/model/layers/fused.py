"""Elementwise expressions that keep less for the backward pass than torch would: inputs, and no intermediate results.

Each is one `autograd.Function` of plain tensor operations, so that it runs everywhere, and a compiler may fuse it. They
write into their own temporaries wherever they can: on a CPU a fresh result costs many times the arithmetic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def _product(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight: of `grad` `[.., out]` and the input x `[.., in]`, `[out, in]`."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_weight: Tensor, value_weight: Tensor, out_weight: Tensor) -> Tensor:
        gate, value = F.linear(x, gate_weight), F.linear(x, value_weight)
        ctx.save_for_backward(x, gate, value, gate_weight, value_weight, out_weight)
        return F.linear(F.silu(gate).mul_(value), out_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, value, gate_weight, value_weight, out_weight = ctx.saved_tensors
        needs_x, needs_gate, needs_value, needs_out = ctx.needs_input_grad
        grad_hidden = grad @ out_weight
        grad_gate = grad_hidden * value
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        hidden = F.silu(gate)
        grad_value = grad_hidden.mul_(hidden)
        grad_out = _product(grad, hidden.mul_(value)) if needs_out else None
        grad_x = (grad_gate @ gate_weight).add_(grad_value @ value_weight) if needs_x else None
        return (
            grad_x,
            _product(grad_gate, x) if needs_gate else None,
            _product(grad_value, x) if needs_value else None,
            grad_out,
        )


def swiglu_mlp(x: Tensor, gate: nn.Module, value: nn.Module, out: nn.Module) -> Tensor:
    """`out(silu(gate(x)) * value(x))` of three linear maps; the backward pass computes the hidden features again."""
    dtype = compute_dtype(x)
    return _SwiGLU.apply(x.to(dtype), *[linear.weight.to(dtype) for linear in (gate, value, out)])


def is_plain(*linears: nn.Module) -> bool:
    """Whether all are linear maps without a bias, not wrapped, replaced or hooked: their weights are all of them."""
    return all(
        type(linear) is nn.Linear
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        for linear in linears
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of x: its own, or autocast's."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _sum_rows(per_token: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """`[1, tokens, width]` added up to `[rows, width]`, in float32."""
    sums = per_token.new_zeros(num_rows, per_token.shape[-1], dtype=torch.float32)
    return sums.index_add_(0, index, per_token[0].float())


class _NormModulate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x.float(), (x.shape[-1],), None, None, eps)
        ctx.save_for_backward(x, mean, rstd, scale, index)
        # As x * (1 + scale) + shift would: under autocast x is float32 and the rows are not.
        dtype = torch.promote_types(x.dtype, scale.dtype)
        out = normed.to(dtype).mul_((1 + scale).to(dtype).index_select(0, index))
        return out.add_(shift.to(dtype).index_select(0, index))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, index = ctx.saved_tensors
        rows, wide = scale.shape[0], x.float()
        grad_scale = _sum_rows((wide - mean).mul_(rstd).mul_(grad), index, rows)
        grad_shift = _sum_rows(grad, index, rows)
        grad_normed = (1 + scale).float().index_select(0, index)[None].mul_(grad)
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
        ctx.x_dtype = x.dtype
        dtype = torch.promote_types(x.dtype, torch.promote_types(gate.dtype, branch.dtype))
        return gate.to(dtype).index_select(0, index)[None].mul_(branch).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch, index = ctx.saved_tensors
        grad_gate = _sum_rows(grad * branch, index, gate.shape[0]).to(gate.dtype)
        grad_branch = gate.to(grad.dtype).index_select(0, index)[None].mul_(grad)
        return grad.to(ctx.x_dtype), grad_gate, grad_branch.to(branch.dtype), None


def gated_add(x: Tensor, gate: Tensor, branch: Tensor, index: Tensor) -> Tensor:
    """`x + gate[index] * branch`; x and branch `[1, tokens, width]`, gate `[rows, width]`, index int64 `[tokens]`."""
    return _GatedAdd.apply(x, gate, branch, index)
