"""A file of results that is written while answers come in, and goes on after a kill."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flextok.fusion.journal import Journal
from flextok.fusion.results import check_row, check_target, config_text, write_results

_ABSENT = "absent"


class ResultFile:
    """Finished rows wait in a journal beside the file; `close` makes the typed file of them and removes the journal.

        with ResultFile(path, config, overwrite=False, resume=True) as results:
            for batch in batches:
                results.add([row for row in answer(batch) if (row["uuid"], None) not in results.done])

    A block that ends with an exception leaves the journal, as a kill does.

    Args:
        path: The file, `.feather` or `.parquet`.
        run_config: How the rows are made, in JSON types; that of the journal has to be equal.
        overwrite: Whether an existing file is replaced, at the end.
        resume: Whether to go on with the journal of an interrupted run, if there is one.

    Attributes:
        done: `(uuid, variant)` of all rows so far; the variant is None where rows have none.
        rows: These rows, in the order they were added.

    Raises:
        ValueError: The suffix is unknown; the journal was made with another `run_config`, is damaged, or belongs to a
            process that is running.
        FileExistsError: The file exists without `overwrite`, or a journal without `resume` and `overwrite`.
    """

    def __init__(self, path: str | Path, run_config: Mapping[str, Any], *, overwrite: bool, resume: bool) -> None:
        self.path = check_target(path, overwrite=overwrite)
        self.journal_path = self.path.with_name(f"{self.path.name}.journal")
        self.run_config: dict[str, Any] = json.loads(config_text(run_config))
        if self.journal_path.exists() and not (resume or overwrite):
            raise FileExistsError(
                f"{self.journal_path} holds the rows of an interrupted run; resume=true goes on with it, "
                "overwrite=true starts anew"
            )
        self._journal = Journal(self.journal_path)
        try:
            self.rows = self._rows_so_far(resume)
        except BaseException:
            self._journal.close()
            raise
        self.done = {check_row(row) for row in self.rows}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append finished rows; they are on the disk afterwards.

        Raises:
            ValueError: A row is not as `write_results` wants it, or is there already. Then none of them is written.
        """
        keys = [check_row(row) for row in rows]
        for place, key in enumerate(keys):
            if key in self.done or key in keys[:place]:
                raise ValueError(f"uuid={key[0]!r}, variant={key[1]} is in {self.path.name} already")
        added = [dict(row) for row in rows]
        self._journal.add(added)
        self.rows += added
        self.done.update(keys)

    def close(self) -> None:
        """Write the typed file, and remove the journal."""
        write_results(self.path, self.rows, self.run_config, overwrite=True)
        self.journal_path.unlink()
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._journal.close()

    def _rows_so_far(self, resume: bool) -> list[dict[str, Any]]:
        records = self._journal.records
        if records and not resume:
            self._journal.clear()
            records = []
        if not records:
            self._journal.add([{"run_config": self.run_config}])
            return []
        head, *rows = records
        self._check_config(head.get("run_config", {}))
        return rows

    def _check_config(self, before: dict[str, Any]) -> None:
        for key in sorted(before.keys() | self.run_config.keys()):
            old, new = before.get(key, _ABSENT), self.run_config.get(key, _ABSENT)
            if old != new:
                raise ValueError(
                    f"{self.journal_path} was made with {key}={old!r}, this run has {key}={new!r}; resume with the "
                    "same settings, or start anew with resume=false and overwrite=true"
                )
