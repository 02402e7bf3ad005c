"""Sparse attention in causal language models of transformers: for prefill and decoding, and what it costs and saves."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextok.sparse_lm.attention import sparse_attention
    from flextok.sparse_lm.dials import dial
    from flextok.sparse_lm.state import SparseState

__all__ = ["SparseState", "dial", "sparse_attention"]
# Loaded on first use: transformers takes seconds.
_MODULES = {"sparse_attention": "attention", "dial": "dials", "SparseState": "state"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
