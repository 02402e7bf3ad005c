"""What a forward really did: tokens per trunk, attention backends, bytes kept for the backward pass."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Observation:
    """Noted over one or more forwards."""

    tokens: Counter[str] = field(default_factory=Counter)
    """Tokens that went through each trunk."""
    backends: Counter[str] = field(default_factory=Counter)
    """How many forwards of a trunk each attention backend answered."""


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that stay alive for the backward pass of `forward`: each storage once, those of parameters not counted."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    # Until here the graph of the result kept all of them alive, so no address was used twice.
    del result
    return sum(kept.values())
