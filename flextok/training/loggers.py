"""Loggers for numbers: one csv per run that survives a resume, and wandb that needs no account."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from flextok.utils.checkpoint import atomic_path


class CsvLogger(Logger):
    """Writes `metrics.csv` into the run folder: one row per step, one column per metric.

    A run that goes on in its old folder appends, and replaces the rows written beyond its checkpoint.
    (Lightning's `CSVLogger` deletes the file it finds.)
    """

    def __init__(self, *, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None
        self._row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Collect the metrics of one step; the row is written when the next step begins."""
        if step is None:
            raise ValueError("metrics.csv needs the step of every metric")
        if self._columns is None:
            self._open(step)
        if self._row and self._row["step"] != step:
            self.save()
        self._row.update(metrics, step=step)

    @rank_zero_only
    def save(self) -> None:
        """Write the row that is being collected."""
        if not self._row:
            return
        assert self._columns is not None
        if missing := [name for name in self._row if name not in self._columns]:
            self._columns += sorted(missing)
            self._rewrite(self._read())
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(self._row)
        self._row = {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left, however the run ended."""
        self.save()

    def _open(self, first_step: int) -> None:
        rows = [row for row in self._read() if int(row["step"]) < first_step]
        self._columns = list(rows[0]) if rows else ["step"]
        self._rewrite(rows)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            # A killed run may leave half a row: its step is empty or it lacks columns.
            return [row for row in csv.DictReader(file) if row["step"] and None not in row.values()]

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        assert self._columns is not None
        with atomic_path(self.path) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def wandb_logger(**options: Any) -> WandbLogger:
    """A `WandbLogger` that is offline unless `WANDB_MODE` or `WANDB_API_KEY` says that there is an account.

    With neither, wandb would try to log in for half a minute and fail.
    """
    has_account = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
    return WandbLogger(**options) if has_account else WandbLogger(offline=True, **options)
