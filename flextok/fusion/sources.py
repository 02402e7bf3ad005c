"""Where items come from. `fusion/data=<name>` builds one of the classes here, in `webqa` or in `myriadlama`."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from flextok.embedded import embedded_file
from flextok.fusion.items import Item, read_items
from flextok.fusion.prompts import PromptStyle

if TYPE_CHECKING:
    from datasets import Dataset

_T = TypeVar("_T")


class ItemSource(Protocol):
    """A set of questions: those to answer, some to show as examples, and how both are worded."""

    prompts: PromptStyle

    def test_items(self) -> list[Item]:
        """The items to answer."""

    def example_items(self) -> list[Item]:
        """The items to show with their answers in front of every question; may be none."""


class JsonLinesItems:
    """Items of local files.

    Args:
        path: JSON lines with `uuid`, `answers` and `paraphrases`; `embedded:<file>` is one that comes with the package.
        examples_path: Likewise, to draw examples from; those that are in `path`, too, are left out. None if
            `num_examples` is 0.
        num_examples: How many are drawn.
        seed: Of that draw.
        prompts: How prompts are worded.

    Raises:
        ValueError: There is nothing to draw examples from; and by its methods, a file is not as `read_items` wants it
            or holds too few examples.
    """

    def __init__(
        self, *, path: str, examples_path: str | None, num_examples: int, seed: int, prompts: PromptStyle
    ) -> None:
        if num_examples and examples_path is None:
            raise ValueError(
                f"fusion.data.num_examples={num_examples} needs fusion.data.examples_path to draw from; or set it to 0"
            )
        self.path = path
        self.examples_path = examples_path
        self.num_examples = num_examples
        self.seed = seed
        self.prompts = prompts

    def test_items(self) -> list[Item]:
        """All items of the file, in its order."""
        return read_items(embedded_file(self.path))

    def example_items(self) -> list[Item]:
        """The drawn examples."""
        if not self.num_examples:
            return []
        assert self.examples_path is not None
        return draw_examples(
            read_items(embedded_file(self.examples_path)), self.test_items(), self.num_examples, self.seed
        )


def draw_examples(pool: Sequence[Item], test_items: Sequence[Item], num_examples: int, seed: int) -> list[Item]:
    """Draw items that are not test items; no global random state is used.

    Raises:
        ValueError: There are too few.
    """
    tested = {item.uuid for item in test_items}
    return draw([item for item in pool if item.uuid not in tested], num_examples, seed, field="num_examples")


def draw(values: Sequence[_T], count: int, seed: int | str, *, field: str) -> list[_T]:
    """`count` of the values, in the order they are drawn in.

    Raises:
        ValueError: There are too few, or the count is negative.
    """
    if not 0 <= count <= len(values):
        raise ValueError(f"fusion.data.{field}={count}: valid are 0 to {len(values)}, which is how many there are")
    return random.Random(seed).sample(values, count)


def check_columns(table: "Dataset", fields: dict[str, str], where: str) -> None:
    """ValueError that names the setting if a table lacks a column; `fields` are settings and the columns they name."""
    for field, column in fields.items():
        if column not in table.column_names:
            raise ValueError(
                f"fusion.data.{field}={column!r} is not in {where}; valid: one of {', '.join(table.column_names)}"
            )


def is_json_lines(path: str) -> bool:
    """Whether a path means a file of items and no table."""
    return Path(path).suffix == ".jsonl"
