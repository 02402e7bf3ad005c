"""Decode all images at every point of a grid, point after point, and keep the numbers and a few pictures."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from flextok.attention.density import Density, record_density
from flextok.attention.engine import record_backends
from flextok.data.samplers import rank_and_world_size
from flextok.evaluation.encoding import EncodedSplit
from flextok.evaluation.grid import Point, decode_options, prepare
from flextok.evaluation.images import Batches
from flextok.evaluation.judges import Judges
from flextok.evaluation.lengths import Search, measure_lengths, reason_missing, summarize_lengths
from flextok.evaluation.pictures import Extremes, FirstImages, PointPictures
from flextok.evaluation.point_metrics import PointMetrics, summary_row
from flextok.evaluation.points import PointNumbers, PointStore
from flextok.evaluation.processes import joined, of_first_process
from flextok.evaluation.progress import Progress
from flextok.evaluation.settings import EvaluationSettings
from flextok.evaluation.sparse_sweep import DENSE
from flextok.reconstruct import decode_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The encoded images, for each point its numbers, a row of them ready for JSON, and its pictures.

    Of a search for the shortest prefixes there are no pictures, and no numbers if its network is missing.
    """

    encoded: EncodedSplit
    points: list[Point]
    numbers: list[PointNumbers]
    results: list[dict[str, Any]]
    pictures: list[PointPictures]
    searches: list[Search]
    lengths: list[PointNumbers | None]
    targets: list[dict[str, Any]]

    @property
    def attention_backends(self) -> list[str]:
        """All that answered anywhere."""
        found = (*self.numbers, *(lengths for lengths in self.lengths if lengths is not None))
        return sorted(self.encoded.attention_backends.union(*(numbers.attention_backends for numbers in found)))


@torch.no_grad()
def run_points(
    model: Any,
    encoded: EncodedSplit,
    batches: Batches,
    points: Sequence[Point],
    searches: Sequence[Search],
    settings: EvaluationSettings,
    *,
    device: torch.device,
    judges: Judges,
    store: PointStore,
) -> SweepResult:
    """Measure what is not in the store yet, or all of it without `settings.resume`; call on every rank.

    `batches` are those that were encoded, from the start each time they are iterated.
    """
    reasons = {search: reason_missing(search, judges) for search in searches}
    items: list[Point | Search] = [*points, *(search for search in searches if reasons[search] is None)]
    there = of_first_process(lambda: [settings.resume and store.has(item) for item in items])
    missing = [item for item, is_there in zip(items, there, strict=True) if not is_there]
    if len(missing) < len(items):
        logger.info("%d of %d points were measured before", len(items) - len(missing), len(items))
    progress = Progress(
        [item.passes(settings.sampler) for item in missing],
        sum(len(batch.keys) for batch in encoded.batches.values()),
        num_processes=rank_and_world_size()[1],
    )
    for item in missing:
        more = (settings, device, judges, progress.add)
        if isinstance(item, Point):
            of_first_process(partial(store.save, item, *_measure(model, encoded, batches, item, *more)))
        else:
            of_first_process(partial(store.save, item, measure_lengths(model, encoded, batches, item, *more)))
        progress.end_point(item.label)
    # As they were stored, so that a sweep in several parts gives what one in one part gives.
    numbers, pictures = of_first_process(
        lambda: ({item: store.numbers(item) for item in items}, [store.pictures(point) for point in points])
    )
    bits = encoded.tokens["bits_per_token"]
    return SweepResult(
        encoded=encoded,
        points=list(points),
        numbers=[numbers[point] for point in points],
        results=[_row(point, numbers[point], encoded, judges) for point in points],
        pictures=pictures,
        searches=list(searches),
        lengths=[numbers.get(search) for search in searches],
        targets=[summarize_lengths(search, numbers.get(search), bits, reasons[search]) for search in searches],
    )


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
    prepare(model, point.curve, settings.sparse)
    options = decode_options(settings, point.curve)
    metrics, clock = PointMetrics(judges, settings), _Clock(device)
    first, extremes = FirstImages(settings.grid_images), Extremes()
    with record_backends() as backends, record_density() as density:
        for number, images, batch in encoded.read_again(batches, device):
            with clock.measure(len(batch.keys), density):
                decoded = decode_tokens(model, batch, keep_k=point.keep_k, seed=settings.seed, **options)
            metrics.add(images, decoded, batch.keys)
            first.add(number, decoded)
            extremes.add(images, decoded, batch.keys, metrics.per_image["psnr"][-len(batch.keys) :])
            tell(len(batch.keys))
    numbers = PointNumbers(
        per_image={name: encoded.in_order(values) for name, values in metrics.per_image.items()},
        of_sets=metrics.of_sets() | _density(point, density),
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


def _density(point: Point, density: Density) -> dict[str, float | None]:
    """The share of pairs that self-attention read; nothing where no maskers act. Call it on every rank."""
    pairs = joined([(density.active, density.allowed)])
    allowed = sum(allowed for _, allowed in pairs)
    if point.curve.maskers == DENSE:
        return {"density": 1.0}
    return {"density": sum(active for active, _ in pairs) / allowed} if allowed else {}


class _Clock:
    """Seconds per image and process; the first batch warms up and counts only where it is the only one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: list[tuple[float, int]] = []

    @contextmanager
    def measure(self, num_images: int, density: Density) -> Iterator[None]:
        self._wait()
        start, before = time.perf_counter(), density.seconds
        yield
        self._wait()
        # Counting pairs is no part of decoding.
        self._batches.append((time.perf_counter() - start - (density.seconds - before), num_images))

    def seconds_per_image(self) -> float:
        """Of all processes; call it on every rank."""
        batches = joined(self._batches[1:]) or joined(self._batches)
        return sum(seconds for seconds, _ in batches) / sum(count for _, count in batches)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
