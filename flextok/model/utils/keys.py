"""Which keys of the data dictionary a module reads and writes, by the names of its attributes."""

from collections.abc import Mapping, Sequence
from typing import Any

# As a read-write key counts for both, it is looked for under both endings.
_READ_ENDINGS = ("read_key", "read_keys", "read_write_key", "read_write_keys", "_from_key")
_WRITE_ENDINGS = ("write_key", "write_keys")


def keys_of(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys read and written according to a module's attributes or settings, by the endings of their names."""
    reads = [key for name, value in settings.items() if name.endswith(_READ_ENDINGS) for key in _as_keys(value)]
    writes = [key for name, value in settings.items() if name.endswith(_WRITE_ENDINGS) for key in _as_keys(value)]
    return list(dict.fromkeys(reads)), list(dict.fromkeys(writes))


def _as_keys(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence):
        return [key for key in value if isinstance(key, str)]
    return []
