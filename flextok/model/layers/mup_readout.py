"""The muP output layer."""

from typing import Any

from torch import Tensor, nn

from flextok.model.init import width_multiples


class MuReadoutFSDP(nn.Linear):
    """A linear layer that divides its input by how many times as wide it is as at the base width.

    The width is read from the layer, for sharding replaces its parameters: from its base shape (`set_base_shapes`), or
    from the `weight_infshape` that the package `mup` sets.
    """

    divides_by_width = True

    def width_mult(self) -> float:
        """Raises ValueError if neither is known."""
        infshape: Any = getattr(self.weight, "infshape", None) or getattr(self, "weight_infshape", None)
        return infshape.width_mult() if infshape is not None else width_multiples(self)[1]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input / self.width_mult())
