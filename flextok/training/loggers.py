"""Loggers for numbers: one csv per run that survives a resume, and wandb that needs no account."""

import csv
import errno
import io
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from flextok.training.run_folder import stored_wandb_id
from flextok.utils.checkpoint import atomic_path

logger = logging.getLogger(__name__)


class CsvLogger(Logger):
    """Writes `metrics.csv` into the run folder: one column per metric, one row per number of steps done.

    A run that goes on in its old folder appends, and replaces the rows written beyond its checkpoint. While the disk
    is full, rows wait in memory. (Lightning's `CSVLogger` deletes the file it finds.)
    """

    def __init__(self, *, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None
        self._rows: list[dict[str, Any]] = []
        """The newest, which may yet grow, after those that wait."""
        self._end = self._size = 0
        """Where they begin in the file, and where it ends."""
        self._is_waiting = False

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
        """Write the metrics into the row of their step, at once: a killed run must not take them along."""
        if step is None:
            raise ValueError("metrics.csv needs the step of every metric")
        if not metrics:
            return
        steps_done = step + 1  # Lightning counts from 0; pictures, checkpoints and log lines do not.
        if not self._rows or self._rows[-1]["step"] != steps_done:
            if self._rows and not self._is_waiting:
                self._rows, self._end = [], self._size
            self._rows.append({"step": steps_done})
        self._rows[-1].update(metrics)
        self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Try once more to write what waits."""
        if self._is_waiting:
            self._write()
        if self._is_waiting:
            logger.error("%s lacks its last %d rows: the disk took no more", self.path, len(self._rows))

    def _write(self) -> None:
        try:
            self._write_rows()
        except OSError as error:
            if not self._is_waiting:
                logger.warning("%s cannot be written, rows wait in memory: %s", self.path, error)
            self._is_waiting = True
            return
        if self._is_waiting:
            logger.warning("%s can be written again, %d rows had waited", self.path, len(self._rows))
        self._is_waiting = False

    def _write_rows(self) -> None:
        if self._columns is None or not self.path.exists():
            self._open(self._rows[0]["step"])
        assert self._columns is not None
        names = {name for row in self._rows for name in row}
        if missing := sorted(names - set(self._columns)):
            self._rewrite(self._read(self._end), [*self._columns, *missing])
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(self._rows)
        content = text.getvalue().encode()
        # One call for all of it: being killed leaves the old row or the new one.
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._end)
            written = file.write(content)
            file.truncate()
        self._size = self._end + len(content)
        if written < len(content):
            raise OSError(errno.ENOSPC, "half a row was written", str(self.path))

    def _open(self, first_step: int) -> None:
        rows = [row for row in self._read() if int(row["step"]) < first_step]
        self._rewrite(rows, list(rows[0]) if rows else ["step"])

    def _read(self, end: int | None = None) -> list[dict[str, Any]]:
        """The rows in the file, up to a position; what is damaged is said."""
        if not self.path.exists():
            return []
        try:
            text = self.path.read_bytes()[:end].decode()
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            rows = list(reader)
            if text and "step" not in (reader.fieldnames or ()):
                raise ValueError("its first line names no column step")
        except (csv.Error, ValueError) as error:
            aside = self.path.with_suffix(".damaged.csv")
            logger.warning("%s is damaged (%s): it is now %s, a new one starts", self.path, error, aside.name)
            self.path.replace(aside)
            return []
        # A row that a kill cut short lacks columns, or the end of its line.
        whole = [row for row in rows if None not in row and None not in row.values() and row["step"].isdecimal()]
        if whole and whole[-1] is rows[-1] and not text.endswith("\n"):
            whole.pop()
        if len(whole) < len(rows):
            logger.warning("%s: %d rows were cut short and are left out", self.path, len(rows) - len(whole))
        return whole

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        with atomic_path(self.path) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        self._columns, self._end = columns, self.path.stat().st_size


def wandb_logger(*, folder: str, ckpt_path: str | None, **options: Any) -> WandbLogger:
    """A `WandbLogger` that is offline unless `WANDB_MODE` or `WANDB_API_KEY` says that there is an account.

    With neither, wandb would try to log in for half a minute and fail.

    A run that is continued goes on in the wandb run it wrote to: that of `folder`, the run folder, or of the run that
    `ckpt_path` belongs to. `run_info.json` keeps the id. An `id` among the options comes first.
    """
    has_account = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
    options = {"save_dir": folder, "id": _wandb_id_to_go_on_with(folder, ckpt_path), **options}
    return WandbLogger(**options) if has_account else WandbLogger(offline=True, **options)


def wandb_id(loggers: Sequence[Logger]) -> str | None:
    """The id of the wandb run that the loggers write to, if one of them does."""
    return next((each.version for each in loggers if isinstance(each, WandbLogger)), None)


def _wandb_id_to_go_on_with(folder: str, ckpt_path: str | None) -> str:
    from flextok.training.checkpoints import run_folder_of  # Reads models, which loggers need not wait for.

    if ckpt_path is not None:
        for run in (run_folder_of(Path(ckpt_path).expanduser()), Path(folder)):
            if run is not None and (stored := stored_wandb_id(run)) is not None:
                return stored
    return secrets.token_hex(4)
