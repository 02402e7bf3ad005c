"""How every benchmark here measures, describes the machine it ran on, and writes down what it found."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flextok.provenance import git_revision


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know about where and when the numbers were taken."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
    }


def measure(fn: Callable[[], object], *, repeats: int, warmup: int, device: torch.device) -> float:
    """Median seconds of one call, over `repeats` calls after `warmup` ones that do not count."""
    return median(measure_in_turn({"fn": fn}, repeats=repeats, warmup=warmup, device=device)["fn"])


def measure_in_turn(
    fns: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call of each function, called in turn: A B C A B C ...

    A machine that slows down or speeds up then does so for all of them, so that the ratio of two of them, taken as the
    median of the ratios of each round, holds although their times drift.
    """
    for _ in range(warmup):
        for fn in fns.values():
            fn()
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            seconds[name].append(_time(fn, device))
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of `measure_in_turn` of one function's seconds divided by another's."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows in aligned columns: one per key, in order of first appearance; floats with four digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _time(fn: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    fn()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_model() -> str:
    """The name of the processor; what `platform` knows where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return str(value)
