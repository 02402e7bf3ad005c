"""How checkpoints get onto a disk: whole or not at all, and the one before stays beside the newest."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from flextok.training.sharded_checkpoint import is_sharded_checkpoint, read_sharded

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
# Only while `put_in_place` is at work, or after it was killed.
_OLDEST = "oldest.ckpt"
NEWEST_FIRST = (LAST, PREVIOUS, _OLDEST)


def is_regular(path: Path) -> bool:
    """Whether a checkpoint is one that `RegularCheckpoint` wrote, not one that was the best."""
    return path.name in NEWEST_FIRST or path.name.startswith("step_")


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; those that were there are untouched."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits until the disk has it, and only then moves it there.

    (Lightning's writes into the system's folder for temporary files, from which a file is copied, not moved, if that is
    another disk; and it holds a second copy of all tensors in memory.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file; a `last.ckpt` that it replaces is then `previous.ckpt`.

        Raises:
            CheckpointNotWritten: a full disk, a folder that cannot be written to, or another refusal of the system.
        """
        path = Path(path)
        temporary = beside(path)
        with refusals_explained(path, checkpoint):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                put_in_place(temporary, path)
            finally:
                with suppress(NotADirectoryError):  # Where the folder is a file, there is nothing to remove.
                    temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        if is_sharded_checkpoint(Path(path)):
            return read_sharded(Path(path))  # Of a run that was sharded, as this one is not.
        return super().load_checkpoint(path, map_location, weights_only)


def beside(path: Path) -> Path:
    """Where a checkpoint is written. Always the same name: what a killed run leaves is replaced by the next."""
    return path.with_name(f".{path.name}.tmp")


def put_in_place(written: Path, path: Path) -> None:
    """Move a new checkpoint, a file or a folder, to its place; a `last.ckpt` that is there becomes `previous.ckpt`.

    Whenever it is killed, the checkpoint it replaces is there under one of the names, or the new one is. (Of folders
    with another name, such as `best.ckpt`, none may be; `last.ckpt` is untouched then.)
    """
    if path.name == LAST:
        _replace_last(written, path)
    else:
        if path.is_dir() or written.is_dir():
            remove(path)
        written.replace(path)
    _wait_for_folder(path.parent)


def _replace_last(written: Path, path: Path) -> None:
    previous, oldest = path.with_name(PREVIOUS), path.with_name(_OLDEST)
    # Not earlier than there is something in its stead: after damage, `previous.ckpt` may be the only whole one.
    if path.exists():
        if previous.exists():
            remove(oldest)
            previous.rename(oldest)
        path.rename(previous)
    written.rename(path)
    remove(oldest)


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextmanager
def refusals_explained(path: Path, checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """Raise what the system refuses to the block as `CheckpointNotWritten`, which says how to go on."""
    before = sys.exception()  # Where an interrupted run is saved, it may be an OSError that has nothing to do with it.
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _refusal(error, before)
        if reason is None:
            raise
        raise _not_written(path, reason, num_bytes(checkpoint)) from error


def num_bytes(content: Any) -> int:
    """Roughly what a nested container takes on the disk: its tensors."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(num_bytes, content.values()))
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        return sum(map(num_bytes, content))
    return 0


def _refusal(error: BaseException | None, before: BaseException | None) -> OSError | None:
    """The system's own words: torch, closing a file that it could not write, hides them behind words of its own."""
    while error is not None and error is not before:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _not_written(path: Path, reason: OSError, needed: int) -> CheckpointNotWritten:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return CheckpointNotWritten(
        f"{path} cannot be written: {reason.strerror or reason}. It takes {_in_units(needed)}, {_in_units(free)} are "
        f"free in {folder}, and older checkpoints stay until it is whole. Make room there, or choose another folder "
        "with hydra.run.dir=<folder>; then continue with ckpt_path=<the folder of this run>"
    )


def _in_units(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _wait_for_folder(folder: Path) -> None:
    """A name, too, is only safe once the disk has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
