"""Train, evaluate and use flexible-length 1D image tokenizers.

Importing this package loads neither torch nor anything else that is heavy: the public classes are resolved on first
use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextok.flextok_wrapper import FlexTok, FlexTokFromHub

__version__ = "0.1.0"
__all__ = ["FlexTok", "FlexTokFromHub", "__version__"]

_LAZY_EXPORTS = {"FlexTok": "flextok.flextok_wrapper", "FlexTokFromHub": "flextok.flextok_wrapper"}


def __getattr__(name: str) -> Any:
    if name in _LAZY_EXPORTS:
        return getattr(import_module(_LAZY_EXPORTS[name]), name)
    raise AttributeError(f"module 'flextok' has no attribute {name!r}")
