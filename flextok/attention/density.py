"""How much of attention sparse attention reads: counted where somebody asks, and for free where nobody does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Density:
    """Pairs of a query and a key, of every head, that were read, and that the layout allows.

    Whole numbers: their order changes nothing.
    """

    active: int = 0
    allowed: int = 0
    seconds: float = 0.0
    """What counting took."""

    @property
    def share(self) -> float | None:
        """None where no part of a model has sparse attention."""
        return self.active / self.allowed if self.allowed else None


_record: ContextVar[Density | None] = ContextVar("attention_density", default=None)


@contextmanager
def record_density() -> Iterator[Density]:
    """Yield what counts the pairs of all self-attention in trunks that have sparse attention, dense layers included."""
    density = Density()
    token = _record.set(density)
    try:
        yield density
    finally:
        _record.reset(token)


def note_density(count: Callable[[], tuple[int, int]]) -> None:
    """Add the active and the allowed pairs that `count` finds, if anybody asked for them."""
    density = _record.get()
    if density is not None:
        start = time.perf_counter()
        active, allowed = count()
        density.active += active
        density.allowed += allowed
        density.seconds += time.perf_counter() - start
