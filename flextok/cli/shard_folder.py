"""Fill a folder of shards one by one, so that being killed costs at most one of them.

Which samples a shard holds depends on their positions alone. A shard counts once it is in the index, and both are
replaced in one step: what is there is always whole.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flextok.data.shard_index import INDEX, ShardKind, check_shard_content, read_index, sha256_of
from flextok.utils.checkpoint import atomic_path

logger = logging.getLogger(__name__)


class ShardFolder:
    """A folder that is being filled; one process may do so at a time.

    Args:
        settings: Everything the content depends on, in plain types. A folder that exists must have the same.
        argument: What the folder is called on the command line.

    Raises:
        ValueError: The folder holds something else, or shards of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], kind: ShardKind, *, argument: str) -> None:
        self.path = path
        self.kind = kind
        self.argument = argument
        settings = json.loads(json.dumps(settings))
        if (path / INDEX).exists():
            self.index = read_index(path, kind)
            self._check_same(self.index["settings"], settings)
        elif path.exists() and (not path.is_dir() or any(file.suffix != ".tmp" for file in path.iterdir())):
            raise ValueError(
                f"{argument}: {path} exists and holds no {kind.content}; valid: a new or an empty folder, or one "
                f"that `{kind.command}` began"
            )
        else:
            self.index = {"format": kind.format, "settings": settings, "splits": {}}
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()

    def open_split(self, name: str, **settings: int | str) -> tuple[dict[str, Any], dict[int, range]]:
        """The entry of a split in the index, and the shards that are missing or damaged with their positions.

        Args:
            settings: What decides the content of the split; among them `samples` and `shard_size`.

        Raises:
            ValueError: The split was begun with others.
        """
        split = self.index["splits"].setdefault(name, {**settings, "shards": []})
        self._check_same({key: split.get(key) for key in settings}, settings, prefix=f"split {name}: ")
        missing = []
        for number, shard in enumerate(split["shards"]):
            try:
                check_shard_content(self.path, shard, self.kind)
            except ValueError as error:
                logger.warning("%s", error)
                missing.append(number)
        samples, size = int(settings["samples"]), int(settings["shard_size"])
        missing += range(len(split["shards"]), -(-samples // size))
        return split, {number: range(number * size, min((number + 1) * size, samples)) for number in missing}

    def write_shard(
        self,
        split_name: str,
        number: int,
        write: Callable[[Path], None],
        *,
        suffix: str,
        num_samples: int,
        num_skipped: int,
    ) -> None:
        """Let `write` make the file of a shard under the path it is given, and enter it into the index."""
        file = f"{split_name}-{number:06d}{suffix}"
        with atomic_path(self.path / file) as temporary:
            write(temporary)
            entry = {
                "file": file,
                "samples": num_samples,
                "skipped": num_skipped,
                "bytes": temporary.stat().st_size,
                "sha256": sha256_of(temporary),
            }
        shards = self.index["splits"][split_name]["shards"]
        shards[number : number + 1] = [entry]
        with atomic_path(self.path / INDEX) as temporary:
            temporary.write_text(json.dumps(self.index, indent=1) + "\n", encoding="utf-8")

    def _check_same(self, stored: Any, asked: Any, *, prefix: str = "") -> None:
        check_same(stored, asked, where=f"{self.argument}: {self.path} holds {self.kind.content}", prefix=prefix)


def check_same(stored: Any, asked: Any, *, where: str, prefix: str = "") -> None:
    """Raise ValueError naming the first setting, at any depth, that is not the one a folder was begun with.

    `where` begins the message: which folder that is, and what it holds.
    """
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in sorted(stored.keys() | asked.keys()):
            check_same(stored.get(name), asked.get(name), where=where, prefix=f"{prefix}{name}.")
    elif stored != asked:
        raise ValueError(
            f"{where} made with {prefix.rstrip('.')}={stored!r}, not {asked!r}; valid: the settings it was begun with, "
            "or another folder"
        )
