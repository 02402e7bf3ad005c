"""A field of settings that is an option on the command line, too. Light: `--help` reads it."""

from dataclasses import field
from typing import Any


def setting_option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field; `text` is what `--help` says of it."""
    return field(default=default, metadata={"help": text, "choices": choices})
