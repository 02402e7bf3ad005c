"""Photographs to try, from packages that may be installed."""

from flextok.data.photos import load_photo

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "china", "flower", "hubble_deep_field")


def available_examples() -> list[str]:
    """Those of `NAMES` whose package is installed and has them."""
    return [name for name in NAMES if _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        load_photo(name)
    except (ImportError, FileNotFoundError):
        return False
    return True
