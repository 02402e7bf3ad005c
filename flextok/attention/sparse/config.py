"""Settings of maskers: the base configurations, and the checks that all of them share.

A *size* is a number of keys (int) or a share of them (float). A configuration says what is wrong with it when it is
made, by the name of the field; numbers from numpy become Python numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np

Number = int | float
Size = Number
T = TypeVar("T")

if TYPE_CHECKING:
    Given = Annotated[T, "what a configuration holds once it is made"]
else:

    class Given:
        """A field that anything can be given for, and that its configuration checks: values come from files."""

        def __class_getitem__(cls, item: Any) -> Any:
            return Any


@dataclass
class MaskerConfig:
    """What every masker's configuration has."""

    search_space: Given[dict[str, Any]] = field(default_factory=dict, kw_only=True)
    """Per field, what a hyper-parameter search may try; maskers do not read it."""

    def __post_init__(self) -> None:
        if not isinstance(self.search_space, dict):
            raise ValueError(f"search_space={self.search_space!r}; valid: a dictionary of fields")


@dataclass
class FixedMaskerConfig(MaskerConfig):
    """Base for maskers that select with certainty."""


@dataclass
class SamplingMaskerConfig(MaskerConfig):
    """Base for maskers that draw keys at random."""


@dataclass
class TopKMaskerConfig(FixedMaskerConfig):
    """Base for maskers that select the `heavy_size` keys with the largest scores."""

    heavy_size: Given[Size]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heavy_size = checked_size("heavy_size", self.heavy_size)


@dataclass
class TopPMaskerConfig(FixedMaskerConfig):
    """Base for maskers that select the keys which hold the share `top_p` of the remaining weight."""

    top_p: Given[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.top_p = float(checked_number("top_p", self.top_p, "a number in [0, 1]", lambda p: 0 <= p <= 1))


def checked_size(name: str, value: Any) -> Size:
    """`value` as a Python number; ValueError unless it is an int or a finite float above 0."""
    valid = "a number of keys (int) or a share of them (float), above 0"
    return checked_number(name, value, valid, lambda size: size > 0)


def checked_int(name: str, value: Any, minimum: int) -> int:
    """`value` as a Python int; ValueError unless it is one of at least `minimum`."""
    return int(
        checked_number(name, value, f"an int >= {minimum}", lambda number: type(number) is int and number >= minimum)
    )


def checked_number(name: str, value: Any, valid: str, is_valid: Any) -> int | float:
    """`value` as a Python number; ValueError unless it is a finite int or float, no bool, and `is_valid` of it."""
    number = value.item() if isinstance(value, np.generic) else value
    # The type and not isinstance: True is an int.
    if type(number) not in (int, float) or not math.isfinite(number) or not is_valid(number):
        raise ValueError(f"{name}={value!r}; valid: {valid}")
    return number


def checked_bool(name: str, value: Any) -> bool:
    """`value`; ValueError unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r}; valid: true or false")
    return bool(value)


def checked_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`; ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; valid: {', '.join(choices)}")
    return value


def num_keys_of(size: Size, num_keys: int) -> int:
    """How many of `num_keys` keys a size means: a share is truncated toward zero, in double precision."""
    return size if isinstance(size, int) else int(size * num_keys)
