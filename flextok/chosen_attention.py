"""Let a model of transformers attend by a function of ours, which is registered there under a name."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@contextmanager
def chosen_attention(model: "PreTrainedModel", name: str) -> Iterator[None]:
    """`model` attends as registered under `name`; afterwards, and after an error, as before.

    The choice is part of the model, so another thread must not run it meanwhile.

    Raises:
        ValueError: for a model whose attention cannot be chosen.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface; "
                "Llama, Qwen, Mistral and most other decoders of transformers 5 do"
            )
        yield
    finally:
        model.set_attn_implementation(before)


def check_plain(
    module: "nn.Module", name: str, arguments: Mapping[str, Any], dropout: float, unknown: Sequence[str] = ()
) -> None:
    """ValueError for a layer whose attention is more than a softmax under a mask.

    Args:
        arguments: what transformers hands to attention beside queries, keys and values.
        unknown: what else `module` has that attention `name` does not know.
    """
    names = [key for key in ("softcap", "s_aux", "position_bias") if arguments.get(key) is not None]
    if names or unknown:
        found = ", ".join([*names, *unknown])
        raise ValueError(f"{type(module).__name__} has {found}, which attention {name!r} does not know")
    if dropout:
        raise ValueError("the model drops attention weights, as in training; call model.eval() first")
