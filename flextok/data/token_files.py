"""The files that tokens are in: Parquet, or tar files in the layout of WebDataset. Equal tokens give equal bytes.

| Parquet column | type          | tar member  | content                                          |
| -------------- | ------------- | ----------- | ------------------------------------------------ |
| `key`          | string        | NAME`.json` | which image this is                              |
| `ids`          | list of int32 | NAME`.npy`  | its tokens, as many as it has                    |
| `height`       | int32         | NAME`.json` | of the image before it was cut to a square       |
| `width`        | int32         | NAME`.json` | likewise                                         |

How the tokens were made stands under `flextok` in the metadata of a Parquet file; in a tar file the hash of the model
is beside the key. A NAME is the key as `flextok.data.tar_shards.member_name` writes it.
"""

import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from flextok.data.tar_shards import StrictTarInfo, member_name

FORMATS = ("parquet", "webdataset")
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, EOFError, tarfile.TarError)


class TokenRow(NamedTuple):
    """The tokens of one image; height and width are those of the image itself."""

    key: str
    ids: Int32[np.ndarray, " length"]
    height: int
    width: int


class TokenStorage(NamedTuple):
    """How one file is written and read: `write` takes its path, the rows, and how they were made.

    `read` raises one of `READ_ERRORS` where the file is damaged.
    """

    suffix: str
    write: Callable[[Path, Sequence[TokenRow], Mapping[str, Any]], None]
    read: Callable[[Path], list[TokenRow]]


def storage_of(name: str) -> TokenStorage:
    """The storage of one of `FORMATS`.

    Raises:
        ValueError: There is none of this name.
        ImportError: It needs pyarrow, which is not installed.
    """
    if name == "webdataset":
        return TokenStorage(".tar", _write_tar, _read_tar)
    if name != "parquet":
        raise ValueError(f"format={name!r} is unknown; valid: {', '.join(FORMATS)}")
    try:
        import pyarrow.parquet  # noqa: F401 (said before hours of work are lost)
    except ImportError as error:
        raise ImportError(
            "tokens in Parquet files need the library pyarrow: pip install 'flextok[tokens]'; without it, choose the "
            "format webdataset"
        ) from error
    return TokenStorage(".parquet", _write_parquet, _read_parquet)


def _write_parquet(path: Path, rows: Sequence[TokenRow], settings: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [("key", pa.string()), ("ids", pa.list_(pa.int32())), ("height", pa.int32()), ("width", pa.int32())],
        metadata={"flextok": json.dumps(settings, sort_keys=True)},
    )
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
    # Ids are close to random: a dictionary of them would only take room.
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def _read_parquet(path: Path) -> list[TokenRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    ids = table["ids"].combine_chunks()
    # A copy: otherwise every row would keep the memory of the library alive.
    parts = np.split(ids.flatten().to_numpy(zero_copy_only=False).copy(), ids.offsets.to_numpy()[1:-1])
    keys, heights, widths = (table[name].to_pylist() for name in ("key", "height", "width"))
    return list(map(TokenRow, keys, parts, heights, widths))


def _write_tar(path: Path, rows: Sequence[TokenRow], settings: Mapping[str, Any]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for row in rows:
            array = BytesIO()
            np.save(array, row.ids)
            about = {"key": row.key, "height": row.height, "width": row.width}
            about["model"] = settings["model"]["weights_sha256"]
            for suffix, content in ((".npy", array.getvalue()), (".json", json.dumps(about).encode())):
                # A new `TarInfo` has no time and no owner.
                member = tarfile.TarInfo(member_name(row.key, suffix))
                member.size = len(content)
                archive.addfile(member, BytesIO(content))


def _read_tar(path: Path) -> list[TokenRow]:
    contents: dict[str, bytes] = {}
    with tarfile.open(path, "r:", tarinfo=StrictTarInfo) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            contents[member.name] = file.read()
    rows = []
    for name in (name for name in contents if name.endswith(".npy")):
        about = json.loads(contents[name.removesuffix(".npy") + ".json"])
        ids = np.load(BytesIO(contents[name]), allow_pickle=False)
        rows.append(TokenRow(about["key"], ids, about["height"], about["width"]))
    return rows
