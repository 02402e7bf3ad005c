"""The index of a folder of shards: which there are, and whether they are what was written.

`index.json` holds the settings the shards were made with and, per split, its shards with their number of samples, size
and checksum. Latents, images and tokens are stored this way.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class ShardKind:
    """What a folder of shards holds, and how errors speak of it.

    Args:
        format: Stands in the index; another one is refused.
        content: What the shards hold, in one word.
        command: What writes them, and writes them again.
        otherwise: What to do with a folder that is none of these.
        argument: What users call the folder.
    """

    format: str
    content: str
    command: str
    otherwise: str
    argument: str = "data.root"


def read_index(folder: Path, kind: ShardKind) -> dict[str, Any]:
    """The content of `index.json`.

    Raises:
        ValueError: The folder is missing, holds nothing of this kind, or its index is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"{kind.argument}={str(folder)!r} is no folder of {kind.content}: it has no {INDEX}; valid: a folder that "
            f"`{kind.command}` wrote ({kind.otherwise})"
        )
    return parse_index(path.read_bytes(), str(path), kind)


def parse_index(content: bytes, path: str, kind: ShardKind) -> dict[str, Any]:
    """The same for an index that was read already; `path` names it in errors.

    Raises:
        ValueError: It is damaged, or of another format.
    """
    try:
        index = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make the {kind.content} again") from error
    if not isinstance(index, dict) or index.get("format") != kind.format:
        raise ValueError(f"{path} is not of the format {kind.format!r}; make the {kind.content} again")
    return index


def check_complete(split: Mapping[str, Any], name: str, folder: Path | str, kind: ShardKind) -> None:
    """Raise ValueError where the shards of a split are not all there yet."""
    done = len(split["shards"])
    expected = -(-split["samples"] // split["shard_size"])
    if done < expected:
        raise ValueError(
            f"{kind.argument}={str(folder)!r}: split {name} has {done} of {expected} shards; run `{kind.command}` "
            "again with the same arguments, it goes on where it stopped"
        )


def check_shard_size(folder: Path, shard: Mapping[str, Any], kind: ShardKind) -> None:
    """Raise ValueError where a shard is missing or does not have the size it was written with; reads nothing."""
    path = folder / shard["file"]
    if not path.is_file():
        raise ValueError(damaged(path, "the file is missing", kind))
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(damaged(path, f"{path.stat().st_size} bytes, written were {shard['bytes']}", kind))


def check_shard_content(folder: Path, shard: Mapping[str, Any], kind: ShardKind) -> None:
    """Raise ValueError where a shard is not, byte by byte, what was written; reads all of it."""
    check_shard_size(folder, shard, kind)
    if sha256_of(folder / shard["file"]) != shard["sha256"]:
        raise ValueError(damaged(folder / shard["file"], "its checksum is wrong", kind))


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path | str, what: str, kind: ShardKind) -> str:
    """The words for a shard that cannot be used."""
    return f"{path} is damaged: {what}; run `{kind.command}` again with the same arguments, it makes this shard anew"
