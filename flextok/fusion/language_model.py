"""Load a causal language model of transformers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_language_model(
    name: str, *, device: "torch.device | str"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model, ready to generate and in the number format it was saved in, and its tokenizer.

    Args:
        name: A folder that `save_pretrained` wrote, a name on the hub, or `embedded:<name>`.
        device: Where it is to run.

    Raises:
        ValueError: There is no such model, or none comes with the package under that name.
        ImportError: transformers is not installed.
    """
    from flextok import embedded

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("language models need transformers: pip install 'flextok[fusion]'") from error
    folder = name
    if name.startswith(embedded.PREFIX):
        folder = str(embedded.embedded_language_model(name.removeprefix(embedded.PREFIX)))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"the language model {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer
