"""A file of JSON lines that grows: a process may be killed at any moment, and the next one goes on."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


class Journal:
    """Records as JSON lines, in an old file or a new one. What was added is on the disk when `add` returns.

    A last line that was cut off is no record, and gone with the first that is added: until then the file stays as it
    is. One process at a time may have it open.

    Attributes:
        path: The file; its folder is made.
        records: What the file held when it was opened.

    Raises:
        ValueError: The file holds a broken line before the last one, or another process has it open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self.path.open("a+b")
        # What a new record comes after: all whole lines, of which the last may lack nothing but its end.
        self._length, self._end = 0, b""
        try:
            _lock(self._file, self.path)
            self.records = self._recover()
        except BaseException:
            self._file.close()
            raise

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records, each a line."""
        self._file.truncate(self._length)
        lines = self._end + b"".join(json.dumps(record).encode() + b"\n" for record in records)
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._length, self._end = self._length + len(lines), b""

    def clear(self) -> None:
        """Forget all records."""
        self._file.truncate(0)
        self.records, self._length, self._end = [], 0, b""

    def close(self) -> None:
        """Let other processes have the file."""
        self._file.close()

    def _recover(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        *whole, last = self._file.read().split(b"\n")
        records = []
        for number, line in enumerate(whole, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number}: is damaged ({error}); remove the file to start anew"
                ) from error
        self._length = sum(len(line) + 1 for line in whole)
        with suppress(ValueError):
            records.append(json.loads(last))
            self._length, self._end = self._length + len(last), b"\n"
        return records


def _lock(file: IO[bytes], path: Path) -> None:
    """The lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks.
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path}: another process is writing this file; valid: one at a time") from error
