"""Feed-forward layers."""

from collections.abc import Callable

from torch import Tensor, nn

from flextok.model.init import InitStyle, MuPInit, init_linear
from flextok.model.layers.fused import is_plain, swiglu_mlp


class Mlp(MuPInit):
    """`fc2(act(fc1 x))`, then dropout."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
        weight_init_style: InitStyle = "xavier",
    ) -> None:
        super().__init__()
        hidden, out = hidden_features or in_features, out_features or in_features
        self.weight_init_style = weight_init_style
        self.fc1 = nn.Linear(in_features, hidden, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, out, bias=bias)
        self.drop = nn.Dropout(drop)
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        for linear in (self.fc1, self.fc2):
            init_linear(linear, self.weight_init_style, mup=mup)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class GatedMlp(MuPInit):
    """`fc2(act(fc1 x) * fc3 x)`, then dropout; hidden width `int(2/3 hidden_features)`. Source: arXiv 2002.05202."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        drop: float = 0.0,
        bias: bool = True,
        weight_init_style: InitStyle = "xavier",
    ) -> None:
        super().__init__()
        hidden, out = int(2 * (hidden_features or in_features) / 3), out_features or in_features
        self.weight_init_style = weight_init_style
        self.fc1 = nn.Linear(in_features, hidden, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, out, bias=bias)
        self.fc3 = nn.Linear(in_features, hidden, bias=bias)
        self.drop = nn.Dropout(drop)
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        for linear in (self.fc1, self.fc2, self.fc3):
            init_linear(linear, self.weight_init_style, mup=mup)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.act, nn.SiLU) and is_plain(self.fc1, self.fc2, self.fc3):
            return self.drop(swiglu_mlp(x, self.fc1, self.fc3, self.fc2))
        return self.drop(self.fc2(self.act(self.fc1(x)) * self.fc3(x)))
