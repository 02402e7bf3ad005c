"""Chunks of a folder in object storage, downloaded once per machine when they are needed."""

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

INDEX = "index.json"


class ChunkCache:
    """A folder with the chunks that were needed last; all processes of a machine share it.

    Args:
        url: Where the chunks are.
        root: Where copies of them are kept, each data set in a folder of its own.
        max_bytes: When there is more than this, chunks that nobody has opened for longest go; None keeps all.

    Raises:
        ValueError: There is no index at the URL.
    """

    def __init__(self, url: str, root: Path, *, max_bytes: int | None) -> None:
        self.url = url.rstrip("/")
        self.max_bytes = max_bytes
        staging = root / f"index-{os.getpid()}"
        staging.mkdir(parents=True, exist_ok=True)
        self._download(INDEX, staging / INDEX)
        # Another content of the same URL gets another folder: chunks have the same names again.
        content = (staging / INDEX).read_bytes()
        self.folder = root / blake2b(self.url.encode() + content, digest_size=8).hexdigest()
        self.folder.mkdir(exist_ok=True)
        os.replace(staging / INDEX, self.folder / INDEX)
        for path in staging.iterdir():
            path.unlink()
        staging.rmdir()

    def get(self, name: str) -> Path:
        """The local copy of a chunk.

        Raises:
            ValueError: It cannot be downloaded.
        """
        from filelock import FileLock

        path = self.folder / name
        try:
            os.utime(path)  # so that no other process throws it away just now
            return path
        except FileNotFoundError:
            pass
        with FileLock(f"{path}.lock"):
            if not path.exists():
                part = self.folder / f"{name}.part"
                part.unlink(missing_ok=True)
                self._download(name, part)
                os.replace(part, path)
                Path(f"{part}.lock").unlink(missing_ok=True)  # LitData's own
        if self.max_bytes is not None:
            with FileLock(self.folder / "room.lock"):
                self._make_room(keep=path)
        return path

    def _make_room(self, keep: Path) -> None:
        found = sorted((path.stat().st_mtime_ns, path) for path in self.folder.glob("*.bin"))
        total = sum(path.stat().st_size for _, path in found)
        for _, path in found:
            if self.max_bytes is None or total <= self.max_bytes:
                return
            if path != keep:
                total -= path.stat().st_size
                path.unlink()

    def _download(self, name: str, target: Path) -> None:
        from litdata.streaming.downloader import get_downloader

        chunks: list[dict[str, Any]] = []
        try:
            get_downloader(self.url, str(target.parent), chunks, {}).download_file(f"{self.url}/{name}", str(target))
        # Every kind of storage has its own kind of errors.
        except Exception as error:
            raise ValueError(f"{self.url}/{name} cannot be downloaded: {error!r}") from error
        if not target.exists():
            raise ValueError(f"{self.url}/{name} cannot be downloaded: there is no such file")


def check_litdata() -> None:
    """Raise ImportError, with the command that installs it, where LitData is missing."""
    try:
        import litdata  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"LitData cannot be imported ({error}): pip install 'flextok[streaming]' and then "
            "pip install --no-deps litdata (it asks for torchvision, which is not needed)"
        ) from error
