"""Weight initialisation, standard and muP, as one table of rules."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

InitStyle = Literal["xavier", "trunc_normal", "zero"]
TOKEN_STD = 0.02


def init_linear(linear: nn.Linear, style: InitStyle = "xavier", *, mup: bool = False) -> None:
    """Initialise a linear layer's weight in `style` and its bias, if any, to zero.

    Raises ValueError for an unknown style, and with `mup` if the layer's base shape is not known.
    """
    if style not in get_args(InitStyle):
        raise ValueError(f"weight_init_style={style!r} is unknown; valid: {', '.join(get_args(InitStyle))}")
    rules: dict[str, Callable[[], Any]] = {
        "zero": lambda: nn.init.zeros_(linear.weight),
        "xavier": lambda: nn.init.xavier_uniform_(linear.weight),
        "trunc_normal": lambda: nn.init.trunc_normal_(linear.weight, std=TOKEN_STD),
    }
    rules[style]()
    if mup:
        with torch.no_grad():
            linear.weight.mul_(_mup_factor(linear, style))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def set_base_shapes(model: nn.Module, base: nn.Module) -> None:
    """Tell each linear layer of `model` the shape it has in the same model of the base width."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.mup_base = base.get_submodule(name).weight.shape  # type: ignore[assignment]


def width_multiples(linear: nn.Linear) -> tuple[float, float]:
    """How many times as many outputs and inputs a layer has as at the base width.

    Raises ValueError if that is not known.
    """
    base: Any = getattr(linear, "mup_base", None)
    if base is None:
        raise ValueError("muP needs base shapes: call flextok.model.init.set_base_shapes(model, base) first")
    return linear.out_features / base[0], linear.in_features / base[1]


def _mup_factor(linear: nn.Linear, style: InitStyle) -> float:
    """What the standard weights are multiplied by: those of the base width, by one over the root of the inputs.

    Outputs of the model get one over the inputs, unless the layer divides by them itself.
    """
    wider_out, wider_in = width_multiples(linear)
    factor: float = wider_in**-0.5
    if wider_out == 1:
        factor = 1.0 if getattr(linear, "divides_by_width", False) else 1 / wider_in
    if style == "xavier":
        base: Any = linear.mup_base
        factor *= ((linear.in_features + linear.out_features) / sum(base)) ** 0.5
    return factor


def init_token(token: nn.Parameter) -> None:
    """Initialise a learned token or a table of tokens (registers, mask token, null condition, position table)."""
    nn.init.trunc_normal_(token, std=TOKEN_STD)


class MuPInit(nn.Module, ABC):
    """Base of modules whose initialisation has a muP twin."""

    @abstractmethod
    def _init_weights(self, *, mup: bool) -> None:
        """Initialise the module's own weights."""

    def init_weights_muP(self) -> None:
        """Re-initialise with the muP rules; needs `set_base_shapes` before."""
        self._init_weights(mup=True)
