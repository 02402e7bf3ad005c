"""Folders of LitData chunks, on disk or in object storage, read one sample at a time in any order.

LitData's own loader is not used: a run that Lightning resumes at the end of an epoch gets other samples from it, and
its order depends on the number of workers. Its reader is made for reading chunks one after the other. So LitData
writes and downloads chunks, and this module finds samples in them.
"""

import json
import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from flextok.data.image_source import ImageSource
from flextok.data.splits import hash_of_names
from flextok.data.streaming_cache import INDEX, ChunkCache, check_litdata
from flextok.data.transforms import Encoded

# Formats of LitData whose bytes are those of an image file.
_ENCODED = ("bytes", "jpeg", "image", "file")
_CONTENT_ERRORS = (OSError, ValueError, LookupError, struct.error)


class ChunkImages(ImageSource):
    """The samples of one folder of chunks.

    Samples are dictionaries with `image` (the bytes of a JPEG, PNG or WebP, or a PIL image) and, if they like, a `key`
    (str). Without one, chunk and row are the key.

    Args:
        path: A folder, or its URL as LitData writes it (`s3://`, `gs://`, ...).
        cache: Where chunks of a URL are kept; None for a folder.
        max_bad_fraction: Part of the images that may be unreadable.
        max_open: How many chunks a process keeps open.

    Raises:
        ValueError: There are no such chunks, or not all of them; while reading, if a chunk is damaged.
        ImportError: LitData is not installed.
    """

    def __init__(self, path: str, *, cache: ChunkCache | None, max_bad_fraction: float, max_open: int) -> None:
        check_litdata()
        self.path = path
        self.cache = cache
        self.folder = Path(path).expanduser() if cache is None else cache.folder
        index = _read_index(self.folder, path)
        self.chunks: list[dict[str, Any]] = index["chunks"]
        self.sizes = [int(chunk["chunk_size"]) for chunk in self.chunks]
        self.ends = list(accumulate(self.sizes))
        self.formats = _formats(index["config"], path)
        self.max_open = max_open
        self._open_chunks: OrderedDict[int, _Chunk] = OrderedDict()
        for chunk in self.chunks if cache is None else ():
            _check_size(self.folder / chunk["filename"], chunk)
        super().__init__(self.ends[-1], where=f"data.path={path}", max_bad_fraction=max_bad_fraction)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes.
        return {**self.__dict__, "_open_chunks": OrderedDict()}

    def fetch(self, number: int) -> tuple[str, Encoded]:
        """The key of a sample and its encoded image; downloads the chunk if that is needed.

        Raises:
            ValueError: The chunk is missing or damaged.
        """
        place = bisect_right(self.ends, number)
        row = number - (self.ends[place - 1] if place else 0)
        name = self.chunks[place]["filename"]
        chunk = self._chunk(place)
        try:
            values = chunk.row(row)
            image = values["image"]
            if self.formats["image"] == "pil":
                from litdata.streaming.serializers import PILSerializer

                image = PILSerializer.deserialize(image)
            return values.get("key") or f"{Path(name).stem}/{row}", image
        except _CONTENT_ERRORS as error:
            raise ValueError(_damaged(self.folder / name, str(error))) from error

    def fingerprint(self, numbers: Sequence[int]) -> str:
        """Depends on names and sizes of all chunks."""
        return hash_of_names(f"{c['filename']}:{c['chunk_size']}:{c['chunk_bytes']}" for c in self.chunks)

    def _chunk(self, place: int) -> "_Chunk":
        if place not in self._open_chunks:
            chunk = self.chunks[place]
            path = self.folder / chunk["filename"] if self.cache is None else self.cache.get(chunk["filename"])
            _check_size(path, chunk)
            try:
                self._open_chunks[place] = _Chunk(path, self.formats, num_rows=self.sizes[place])
            except _CONTENT_ERRORS as error:
                raise ValueError(_damaged(path, str(error))) from error
            if len(self._open_chunks) > self.max_open:
                self._open_chunks.popitem(last=False)
        self._open_chunks.move_to_end(place)
        return self._open_chunks[place]


class _Chunk:
    """One file of samples in either layout of LitData.

    The older one: the number of rows, where each begins and the last ends, then the rows, each with the sizes of its
    fields (all uint32) and their bytes. The newer one, for samples of plain values: an Arrow table behind the former.
    """

    def __init__(self, path: Path, formats: dict[str, str], *, num_rows: int) -> None:
        from litdata.streaming.item_loader import open_arrow_footer_reader

        self.formats = formats
        with path.open("rb") as file:
            self.content = mmap(file.fileno(), 0, access=ACCESS_READ)
        if struct.unpack_from("<I", self.content)[0] != num_rows:
            raise ValueError("it does not begin with its number of samples")
        found = open_arrow_footer_reader(self.content)
        self.table = None if found is None else found[0]

    def row(self, row: int) -> dict[str, Any]:
        return self._table_row(row) if self.table is not None else self._plain_row(row)

    def _table_row(self, row: int) -> dict[str, Any]:
        assert self.table is not None
        per_batch = self.table.get_batch(0).num_rows
        values = self.table.get_batch(row // per_batch)
        return {name: values.column(name)[row % per_batch].as_py() for name in ("image", "key") if name in self.formats}

    def _plain_row(self, row: int) -> dict[str, Any]:
        start, end = struct.unpack_from("<2I", self.content, 4 * (1 + row))
        sizes = struct.unpack_from(f"<{len(self.formats)}I", self.content, start)
        ends = list(accumulate(sizes, initial=start + 4 * len(sizes)))
        if ends[-1] != end:
            raise ValueError(f"the sizes in row {row} are wrong")
        values: dict[str, Any] = {
            name: self.content[ends[place] : ends[place + 1]] for place, name in enumerate(self.formats)
        }
        if "key" in values:
            values["key"] = values["key"].decode("utf-8")
        return values


def _read_index(folder: Path, path: str) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(
            f"data.path={path} is no folder of LitData chunks: it has no {INDEX}; valid: the folder (or URL) above one "
            "folder for each of data.train_split, data.val_split and data.test_split"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if not index["chunks"]:
            raise ValueError(f"{file} names no chunk")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); write the data set again") from error
    return dict(index)


def _formats(config: dict[str, Any], path: str) -> dict[str, str]:
    """The format of each field of a sample, by name, in the order in which they are stored."""
    if config.get("compression") or config.get("encryption"):
        raise ValueError(f"data.path={path} is compressed or encrypted; valid: plain chunks (images are compressed)")
    spec = json.loads(config["data_spec"])[1] if config.get("data_spec") else {}
    names = json.loads(spec["context"]) if spec.get("type") == "builtins.dict" else []
    if len(names) != len(config["data_format"]) or "image" not in names:
        raise ValueError(
            f"data.path={path} has samples with the fields {names}; valid: dictionaries of single values with 'image' "
            "and, if you like, 'key'"
        )
    formats = {name: stored.split(":")[0] for name, stored in zip(names, config["data_format"], strict=True)}
    for field, valid in (("image", (*_ENCODED, "pil")), ("key", ("str",))):
        if formats.get(field, valid[0]) not in valid:
            raise ValueError(f"data.path={path}: {field} is stored as {formats[field]!r}; valid: {', '.join(valid)}")
    return formats


def _check_size(path: Path, chunk: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(_damaged(path, "the file is missing"))
    if path.stat().st_size != chunk["chunk_bytes"]:
        raise ValueError(_damaged(path, f"{path.stat().st_size} bytes, written were {chunk['chunk_bytes']}"))


def _damaged(path: str | os.PathLike[str], what: str) -> str:
    return f"the chunk {path} is damaged: {what}; copy or write it again"
