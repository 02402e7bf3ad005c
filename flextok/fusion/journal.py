"""A file of JSON lines that grows: a process may be killed at any moment, and the next one goes on."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any


class Journal:
    """Records as JSON lines, in an old file or a new one. What was added is on the disk when `add` returns.

    A last line that was cut off is dropped when the file is opened. One process at a time may have it open.

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
        try:
            _lock(self._file, self.path)
            self.records = self._recover()
        except BaseException:
            self._file.close()
            raise

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records, each a line."""
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Forget all records."""
        self._file.truncate(0)
        self.records = []

    def close(self) -> None:
        """Let other processes have the file."""
        self._file.close()

    def _recover(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        records = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number}: is damaged ({error}); remove the file to start anew"
                ) from error
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
