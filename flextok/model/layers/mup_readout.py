"""The muP output layer, loaded only where a config asks for it."""

from typing import Any

from torch import nn


def MuReadoutFSDP(in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> nn.Linear:
    """`mup.MuReadout` (divides its input by the width multiplier) that also accepts its shape from `weight_infshape`.

    Sharding replaces parameters by flat views without an `infshape`; the layer then reads the one kept on itself.

    Raises:
        ImportError: the optional package `mup` is missing.
    """
    try:
        from mup import MuReadout
    except ImportError as error:
        raise ImportError("use_mup_readout=true needs the package `mup`: pip install --no-deps mup") from error

    class _MuReadout(MuReadout):
        def width_mult(self) -> float:
            infshape = getattr(self.weight, "infshape", None) or getattr(self, "weight_infshape", None)
            if infshape is None:
                raise ValueError("use_mup_readout=true needs base shapes: call mup.set_base_shapes(model, ...) first")
            return infshape.width_mult()

    return _MuReadout(in_features, out_features, bias=bias, **kwargs)
