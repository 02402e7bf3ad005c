"""Decode all images at every point of a grid, point after point, and keep the numbers and a few pictures."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from flextok.attention.engine import record_backends
from flextok.data.samplers import rank_and_world_size
from flextok.evaluation.encoding import EncodedSplit
from flextok.evaluation.grid import Point, decode_options, prepare
from flextok.evaluation.images import Batches
from flextok.evaluation.judges import Judges, PointMetrics, summary_row
from flextok.evaluation.pictures import Extremes, FirstImages, PointPictures
from flextok.evaluation.points import PointNumbers, PointStore
from flextok.evaluation.processes import joined, of_first_process
from flextok.evaluation.progress import Progress
from flextok.evaluation.settings import EvaluationSettings
from flextok.reconstruct import decode_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The encoded images, and for each point its numbers, a row of them ready for JSON, and its pictures."""

    encoded: EncodedSplit
    points: list[Point]
    numbers: list[PointNumbers]
    results: list[dict[str, Any]]
    pictures: list[PointPictures]

    @property
    def attention_backends(self) -> list[str]:
        """All that answered anywhere."""
        return sorted(self.encoded.attention_backends.union(*(point.attention_backends for point in self.numbers)))


@torch.no_grad()
def run_points(
    model: Any,
    encoded: EncodedSplit,
    batches: Batches,
    points: Sequence[Point],
    settings: EvaluationSettings,
    *,
    device: torch.device,
    judges: Judges,
    store: PointStore,
) -> SweepResult:
    """Measure the points that are not in the store yet, or all of them without `settings.resume`; call on every rank.

    `batches` are those that were encoded, from the start each time they are iterated.
    """
    there = of_first_process(lambda: [settings.resume and store.has(point) for point in points])
    missing = [point for point, is_there in zip(points, there, strict=True) if not is_there]
    if len(missing) < len(points):
        logger.info("%d of %d points were measured before", len(points) - len(missing), len(points))
    progress = Progress(
        [point.passes(settings.sampler) for point in missing],
        sum(len(batch.keys) for batch in encoded.batches.values()),
        num_processes=rank_and_world_size()[1],
    )
    for point in missing:
        measured = _measure(model, encoded, batches, point, settings, device, judges, progress.add)
        of_first_process(partial(store.save, point, *measured))
        progress.end_point(point.label)
    # As they were stored, so that a sweep in several parts gives what one in one part gives.
    numbers, pictures = of_first_process(
        lambda: ([store.numbers(point) for point in points], [store.pictures(point) for point in points])
    )
    rows = [_row(point, found, encoded, judges) for point, found in zip(points, numbers, strict=True)]
    return SweepResult(encoded=encoded, points=list(points), numbers=numbers, results=rows, pictures=pictures)


def _measure(
    model: Any,
    encoded: EncodedSplit,
    batches: Batches,
    point: Point,
    settings: EvaluationSettings,
    device: torch.device,
    judges: Judges,
    tell: Callable[[int], None],
) -> tuple[PointNumbers, PointPictures]:
    prepare(model, point.curve)
    options = decode_options(settings, point.curve)
    metrics, clock = PointMetrics(judges, settings), _Clock(device)
    first, extremes = FirstImages(settings.grid_images), Extremes()
    with record_backends() as backends:
        for number, images, batch in encoded.read_again(batches):
            images = images.to(device)
            batch = replace(batch, quants=[quants.to(device) for quants in batch.quants])
            with clock.measure(len(batch.keys)):
                decoded = decode_tokens(model, batch, keep_k=point.keep_k, seed=settings.seed, **options)
            metrics.add(images, decoded, batch.keys)
            first.add(number, decoded)
            extremes.add(images, decoded, batch.keys, metrics.per_image["psnr"][-len(batch.keys) :])
            tell(len(batch.keys))
    numbers = PointNumbers(
        per_image={name: encoded.in_order(values) for name, values in metrics.per_image.items()},
        of_sets=metrics.of_sets(),
        seconds_per_image=clock.seconds_per_image(),
        attention_backends=sorted(set(joined(set(backends)))),
    )
    return numbers, PointPictures(first=first.of_all_processes(), extremes=extremes.of_all_processes())


def _row(point: Point, numbers: PointNumbers, encoded: EncodedSplit, judges: Judges) -> dict[str, Any]:
    return {
        **point.columns,
        **summary_row(numbers.per_image, numbers.of_sets, judges),
        "bits_per_image": point.keep_k * encoded.tokens["bits_per_token"],
        "seconds_per_image": numbers.seconds_per_image,
    }


class _Clock:
    """Seconds per image and process; the first batch warms up and counts only where it is the only one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: list[tuple[float, int]] = []

    @contextmanager
    def measure(self, num_images: int) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self._batches.append((time.perf_counter() - start, num_images))

    def seconds_per_image(self) -> float:
        """Of all processes; call it on every rank."""
        batches = joined(self._batches[1:]) or joined(self._batches)
        return sum(seconds for seconds, _ in batches) / sum(count for _, count in batches)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
