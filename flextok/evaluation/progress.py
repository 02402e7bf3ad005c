"""How far is a sweep, and how long will it take? Lines of the log, so that they can be read later too."""

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts images through the decoder; the estimate assumes that the passes to come take as long as those before.

    Args:
        passes: of each point that is to be measured, how often an image goes through the decoder.
        num_images: of this process, at each point.
        num_processes: that do the same at the same time.
        clock: seconds.
    """

    def __init__(
        self,
        passes: list[int],
        num_images: int,
        *,
        num_processes: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._passes = passes
        self._num_images = num_images
        self._num_processes = num_processes
        self._clock = clock
        self._start = self._point_start = self._last_line = clock()
        self._points = self._images = 0

    def add(self, num_images: int) -> None:
        """So many more images of the point in work are measured."""
        self._images += num_images
        if self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._say("measuring")

    def end_point(self, label: str) -> None:
        """The point in work is done."""
        self._say(f"measured {label}:")
        self._points, self._images, self._point_start = self._points + 1, 0, self._clock()

    def seconds_left(self) -> float | None:
        """None before anything is known."""
        done = sum(self._passes[: self._points]) * self._num_images
        if self._images:
            done += self._passes[self._points] * self._images
        total = sum(self._passes) * self._num_images
        return (self._clock() - self._start) * (total - done) / done if done else None

    def _say(self, what: str) -> None:
        self._last_line = now = self._clock()
        rate = self._images * self._num_processes / max(now - self._point_start, 1e-9)
        left = self.seconds_left()
        logger.info(
            "%s point %d of %d, %.0f %%, %.3g images/s, %s left",
            *(what, self._points + 1, len(self._passes)),
            *(100 * self._images / max(1, self._num_images), rate, "?" if left is None else duration(left)),
        )


def duration(seconds: float) -> str:
    """Such as `2 h 5 min`, `3 min 20 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
