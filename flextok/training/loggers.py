"""Loggers for numbers: one csv per run that survives a resume, and wandb that needs no account."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from flextok.utils.checkpoint import atomic_path


class CsvLogger(Logger):
    """Writes `metrics.csv` into the run folder: one column per metric, one row per number of steps done.

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
        """Collect the metrics of one step; the row is written when those of another arrive."""
        if step is None:
            raise ValueError("metrics.csv needs the step of every metric")
        steps_done = step + 1  # Lightning counts from 0; pictures, checkpoints and log lines do not.
        if self._row.get("step", steps_done) != steps_done:
            self._write_row()
        self._row.update(metrics, step=steps_done)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left, however the run ended."""
        self._write_row()

    def _write_row(self) -> None:
        if not self._row:
            return
        if self._columns is None:
            self._open(self._row["step"])
        assert self._columns is not None
        if missing := [name for name in self._row if name not in self._columns]:
            self._columns += sorted(missing)
            self._rewrite(self._read())
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(self._row)
        self._row = {}

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
