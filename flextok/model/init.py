"""Weight initialisation, standard and muP, as one table of rules."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import nn

InitStyle = Literal["xavier", "trunc_normal", "zero"]
TOKEN_STD = 0.02


def _initialisers(*, mup: bool) -> Any:
    if not mup:
        return nn.init
    try:
        import mup.init as mup_init
    except ImportError as error:
        raise ImportError("muP initialisation needs the package `mup`: pip install --no-deps mup") from error
    return mup_init


def init_linear(linear: nn.Linear, style: InitStyle = "xavier", *, mup: bool = False) -> None:
    """Initialise a linear layer's weight in `style` and its bias, if any, to zero."""
    if style not in get_args(InitStyle):
        raise ValueError(f"weight_init_style={style!r} is unknown; valid: {', '.join(get_args(InitStyle))}")
    rules: dict[str, Callable[[], Any]] = {
        "zero": lambda: nn.init.zeros_(linear.weight),
        "xavier": lambda: _initialisers(mup=mup).xavier_uniform_(linear.weight),
        "trunc_normal": lambda: _initialisers(mup=mup).trunc_normal_(linear.weight, std=TOKEN_STD),
    }
    rules[style]()
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def init_token(token: nn.Parameter) -> None:
    """Initialise a learned token or a table of tokens (registers, mask token, null condition, position table)."""
    nn.init.trunc_normal_(token, std=TOKEN_STD)


class MuPInit(nn.Module, ABC):
    """Base of modules whose initialisation has a muP twin."""

    @abstractmethod
    def _init_weights(self, *, mup: bool) -> None:
        """Initialise the module's own weights."""

    def init_weights_muP(self) -> None:
        """Re-initialise with the muP rules; needs the package `mup` and base shapes set on the model."""
        self._init_weights(mup=True)
