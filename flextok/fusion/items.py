"""Questions in several wordings, and reading them from JSON lines."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One question in several wordings.

    Attributes:
        uuid: The name of the question, its own among all.
        answers: Any one of them is right.
        paraphrases: The wordings; the first is the original one where there is such a thing.

    Raises:
        ValueError: A field is of another type, is empty, or holds an empty text.
    """

    uuid: str
    answers: list[str]
    paraphrases: list[str]

    def __post_init__(self) -> None:
        if not isinstance(self.uuid, str) or not self.uuid:
            raise ValueError(f"uuid={self.uuid!r} is no name; valid: a text that is not empty")
        for field in ("answers", "paraphrases"):
            texts = getattr(self, field)
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{field}={texts!r} of item {self.uuid!r} is no list of texts")
            if not texts or not all(text.strip() for text in texts):
                raise ValueError(f"{field}={texts!r} of item {self.uuid!r}: needs at least one text, and none empty")


def read_items(path: str | Path) -> list[Item]:
    """Read JSON lines with the fields `uuid`, `answers` and `paraphrases`; other fields are left alone.

    Raises:
        ValueError: The file does not exist or holds no item, or a line is not an item; the message names file, line and
            field.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; valid: JSON lines with uuid, answers and paraphrases")
    items: list[Item] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = _item_of(line)
            if item.uuid in lines:
                raise ValueError(f"uuid={item.uuid!r} is that of line {lines[item.uuid]}, too")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        lines[item.uuid] = number
        items.append(item)
    if not items:
        raise ValueError(f"{path}: holds no item")
    return items


def select_wordings(items: Sequence[Item], *, num_paraphrases: int, indices: Sequence[int] | None = None) -> list[Item]:
    """The items with some of their wordings: those at `indices`, in this order; or without these, the first ones.

    An item with fewer than `num_paraphrases` keeps all it has; one warning says how many there are.

    Raises:
        ValueError: No wording is selected, or an index is out of range.
    """
    if indices is not None:
        return [_at(item, indices) for item in items]
    if num_paraphrases < 1:
        raise ValueError(f"num_paraphrases={num_paraphrases}: it must be at least 1")
    short = [item for item in items if len(item.paraphrases) < num_paraphrases]
    if short:
        fewest = min(short, key=lambda item: len(item.paraphrases))
        logger.warning(
            "%d of %d items have fewer than num_paraphrases=%d wordings, and all of theirs are used; the fewest are "
            "%d, of item %s",
            *(len(short), len(items), num_paraphrases, len(fewest.paraphrases), fewest.uuid),
        )
    return [replace(item, paraphrases=item.paraphrases[:num_paraphrases]) for item in items]


def _at(item: Item, indices: Sequence[int]) -> Item:
    if not indices:
        raise ValueError("indices=[] selects no wording; valid: at least one index")
    count = len(item.paraphrases)
    for index in indices:
        if not 0 <= index < count:
            raise ValueError(
                f"indices={list(indices)}: item {item.uuid!r} has {count} wordings; valid: 0 to {count - 1}"
            )
    return replace(item, paraphrases=[item.paraphrases[index] for index in indices])


def _item_of(line: bytes) -> Item:
    try:
        record: Any = json.loads(line)
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, not an object with uuid, answers and paraphrases")
    missing = [field for field in ("uuid", "answers", "paraphrases") if field not in record]
    if missing:
        raise ValueError(f"the field {' and '.join(missing)} is missing; found: {', '.join(record) or 'none'}")
    return Item(record["uuid"], record["answers"], record["paraphrases"])
