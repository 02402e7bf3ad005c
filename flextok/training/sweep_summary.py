"""What came of a sweep (`-m`): one table over its runs, one over its seeds.

Hydra builds the callback before it does anything else, so nothing heavy is imported here.
"""

import csv
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

STATUS = "status.json"
SUMMARY = "summary.csv"
OVER_SEEDS = "summary_over_seeds.csv"
METRICS = ("val/flow_loss", "train/loss", "psnr")
# Which point of an evaluation the PSNR is of.
PSNR_AT = "psnr at"
_AXES = ("keep_k", "steps", "guidance_scale", "form", "backend", "maskers", "budget")
# Overrides that say where and how a run ran, not what it was.
_NOT_SETTINGS = ("ckpt_path", "paths", "logger", "hparams_search", "optimized_metric")

Row = dict[str, Any]


class SweepSummary(Callback):
    """Writes `status.json` into each run of a sweep, and `summary.csv` and `summary_over_seeds.csv` into the sweep.

    The tables are written whenever a run ends, in whatever process: where a run fails, Hydra ends the sweep after the
    others of its batch, and calls nobody at its end.
    """

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            (_run_folder(config) / STATUS).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder, sweep = _run_folder(config), Path(config.hydra.sweep.dir)
        error = None
        if job_return.status == JobStatus.FAILED:
            error = " ".join(str(job_return._return_value).split())  # `return_value` would raise it.
            logger.error("%s failed: %s", folder, error)
        _write(folder / STATUS, json.dumps({"status": job_return.status.name.lower(), "error": error}) + "\n")
        rows = write_summary(sweep)
        if any(row["status"] == "failed" for row in rows):
            logger.info("%s so far:\n%s", sweep / SUMMARY, format_rows(rows))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = Path(config.hydra.sweep.dir)
        rows = write_summary(sweep)
        logger.info("%s:\n%s", sweep / SUMMARY, format_rows(rows))
        if seeds := over_seeds(rows):
            logger.info("%s:\n%s", sweep / OVER_SEEDS, format_rows(seeds))


def write_summary(sweep: Path) -> list[Row]:
    """Write both tables into the folder of a sweep, and return the rows of the first."""
    folders = [path.parent.parent for path in sweep.glob("*/.hydra/overrides.yaml")]
    rows = [_row(folder) for folder in sorted(folders, key=lambda path: (len(path.name), path.name))]
    _write(sweep / SUMMARY, _as_csv(rows))
    if seeds := over_seeds(rows):
        _write(sweep / OVER_SEEDS, _as_csv(seeds))
    return rows


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row per setting with several seeds: how many runs were completed, mean and deviation of each metric.

    PSNRs of different points have no mean.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in rows:
        setting = {
            name: value
            for name, value in row.items()
            if name not in ("run", "status", "error", "step", *METRICS, PSNR_AT)
        }
        groups.setdefault(tuple((name, value) for name, value in setting.items() if name != "seed"), []).append(row)
    if all(len({row.get("seed") for row in group}) < 2 for group in groups.values()):
        return []
    summary = []
    for pairs, group in groups.items():
        completed = [row for row in group if row["status"] == "completed"]
        entry: Row = {**dict(pairs), "runs": len(completed)}
        for name in METRICS:
            values = [row[name] for row in completed if row.get(name) is not None]
            points = {row[PSNR_AT] for row in completed if name == "psnr" and row.get(PSNR_AT) is not None}
            if values and len(points) < 2:
                entry |= {f"{name} mean": mean(values), f"{name} std": stdev(values) if len(values) > 1 else None}
                if points:
                    entry[PSNR_AT] = points.pop()
        summary.append(entry)
    return summary


def last_metrics(folder: Path) -> dict[str, float]:
    """The last value of each column of the `metrics.csv` of a run; none where there is no such file."""
    path = folder / "metrics.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


def optimized_metric(cfg: DictConfig, metrics: dict[str, float]) -> float | None:
    """The metric that `optimized_metric` names, for a sweeper; None if it names none or the value is not finite.

    Raises:
        ValueError: the run has no such metric.
    """
    name = cfg.optimized_metric
    if name is None:
        return None
    metrics = last_metrics(Path(cfg.paths.run)) | metrics  # A run that had nothing left to do logs nothing.
    if name not in metrics:
        raise ValueError(f"optimized_metric={name!r} is no metric of this run; valid: {', '.join(sorted(metrics))}")
    if not isfinite(metrics[name]):
        logger.warning("optimized_metric=%s is %s: the sweeper is told that the run failed", name, metrics[name])
        return None
    return metrics[name]


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as aligned text, without the columns in which all of several rows are the same."""
    differ = {name for name in _columns(rows) if len(rows) < 2 or len({str(row.get(name)) for row in rows}) > 1}
    metrics = [name for name in _columns(rows) if name.startswith(METRICS)]
    differ |= {"status", *(name for name in metrics if any(row.get(name) is not None for row in rows))}
    names = [name for name in _columns(rows) if name in differ]
    lines = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _row(folder: Path) -> Row:
    """Overrides, what came of the run and where it is. Without a status it runs, or was stopped or killed."""
    overrides: Any = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    pairs = [str(override).lstrip("+").partition("=") for override in overrides if "=" in str(override)]
    settings = {name: value for name, _, value in pairs if name.partition(".")[0] not in _NOT_SETTINGS}
    status = json.loads((folder / STATUS).read_text()) if (folder / STATUS).exists() else {"status": "unfinished"}
    metrics = last_metrics(folder)
    step = int(metrics["step"]) if "step" in metrics else None
    known = {"step": step} | {name: metrics.get(name) for name in METRICS} | _evaluated(folder)
    return {"run": folder.name, **settings, "status": status["status"], **known, "error": status.get("error")}


def _evaluated(folder: Path) -> Row:
    """The PSNR at most tokens, where `eval.py` has judged the run, and the point it is of: of several the first."""
    path = folder / "evaluation" / "metrics.json"
    if not path.exists():
        return {}
    best = max(json.loads(path.read_text(encoding="utf-8"))["results"], key=lambda result: result["keep_k"])
    return {"psnr": best["psnr"], PSNR_AT: " ".join(f"{name}={best[name]}" for name in _AXES if name in best)}


def _run_folder(config: DictConfig) -> Path:
    return Path(config.hydra.runtime.output_dir)


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "-" if value is None else str(value)


def _as_csv(rows: Sequence[Row]) -> str:
    from io import StringIO

    file = StringIO()
    writer = csv.DictWriter(file, fieldnames=_columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _write(path: Path, text: str) -> None:
    from flextok.utils.checkpoint import atomic_path

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
