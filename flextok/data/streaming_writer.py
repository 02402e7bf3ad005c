"""Write folders of LitData chunks for `data=streaming`.

A split is one folder. Each of its shards is one chunk file, which any process may write at any time; the index comes
last. A shard that was written has a description beside it, `<shard>.json`, so an interrupted job can leave it out.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import time
from typing import Any

from flextok.data.streaming_cache import INDEX, check_litdata

# Offsets inside a chunk are unsigned 32-bit numbers.
_MAX_CHUNK_BYTES = 2**32 - 2**20


def write_streaming_split(
    folder: str | Path, samples: Iterable[tuple[str, bytes]], *, shard_bytes: int = 64_000_000
) -> None:
    """Write all samples of a split, shard by shard, in their order.

    Args:
        folder: The folder of the split, `<data set>/train` for example.
        samples: A key for each image, unlike all others, and the content of a JPEG, PNG or WebP file.
        shard_bytes: How many bytes of images go into a shard.

    Raises:
        ValueError: There are no samples.
    """
    num_shards = 0
    for num_shards, shard in enumerate(_shards(samples, shard_bytes), start=1):  # noqa: B007
        write_streaming_shard(folder, num_shards - 1, shard)
    write_streaming_index(folder, num_shards)


def write_streaming_shard(folder: str | Path, shard: int, samples: Iterable[tuple[str, bytes]]) -> None:
    """Write one chunk file, and last its description; both are whole or absent.

    Args:
        folder: The folder of the split.
        shard: The number of the shard, from 0.
        samples: As for `write_streaming_split`; all are held in memory.

    Raises:
        ValueError: There are no samples, or more than 4 GiB of them.
        ImportError: LitData is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_litdata()
    from litdata.streaming.writer import BinaryWriter

    temporary = folder / f".{shard}.part"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        # LitData decides when a chunk is full; we do, by what we give it.
        writer = BinaryWriter(str(temporary), chunk_bytes=2**40)
        total = 0
        for number, (key, image) in enumerate(samples):
            total += len(image)
            if total > _MAX_CHUNK_BYTES:
                raise ValueError(f"shard {shard} of {folder} has more than {_MAX_CHUNK_BYTES} bytes of images")
            writer[number] = {"image": image, "key": key}
        if not total:
            raise ValueError(f"shard {shard} of {folder} has no images")
        writer.done()
        (written,) = temporary.glob("*.bin")
        (index,) = temporary.glob(f"*{INDEX}")
        description = json.loads(index.read_text())
        description["chunks"][0]["filename"] = _chunk_name(shard)
        os.replace(written, folder / _chunk_name(shard))
        _write_json(folder / f"{shard}.json", description)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_shard_written(folder: str | Path, shard: int) -> bool:
    """Whether a shard is complete."""
    return (Path(folder) / f"{shard}.json").is_file()


def write_streaming_index(folder: str | Path, num_shards: int) -> None:
    """Write `index.json`, which makes the shards 0 to `num_shards - 1` a data set.

    Raises:
        ValueError: There are no shards, or one of them is missing.
    """
    folder = Path(folder)
    missing = [shard for shard in range(num_shards) if not is_shard_written(folder, shard)]
    if missing or not num_shards:
        raise ValueError(f"{folder} has no shard {missing[0] if missing else 0}: write it first")
    descriptions = [json.loads((folder / f"{shard}.json").read_text()) for shard in range(num_shards)]
    chunks = [chunk for description in descriptions for chunk in description["chunks"]]
    index = {"chunks": chunks, "config": descriptions[0]["config"], "updated_at": str(time())}
    _write_json(folder / INDEX, index)


def _shards(samples: Iterable[tuple[str, bytes]], shard_bytes: int) -> Iterator[list[tuple[str, bytes]]]:
    shard: list[tuple[str, bytes]] = []
    size = 0
    for key, image in samples:
        if shard and size + len(image) > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((key, image))
        size += len(image)
    if shard:
        yield shard


def _chunk_name(shard: int) -> str:
    return f"chunk-0-{shard}.bin"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, sort_keys=True), encoding="utf-8")
    os.replace(part, path)
