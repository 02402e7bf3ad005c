"""MyriadLAMA: facts as sentences with a gap, from Hugging Face `datasets` or local JSON lines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flextok.fusion.items import Item, read_items
from flextok.fusion.prompts import PromptStyle
from flextok.fusion.sources import check_columns, draw, draw_examples, is_json_lines
from flextok.hub_tables import load_tables

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 10_000


@dataclass
class _Fact:
    """The templates of a uuid, and a row that holds subject and answers, which all rows of the uuid share."""

    row: int
    manual: list[str] = field(default_factory=list)
    automatic: list[str] = field(default_factory=list)


class MyriadLamaItems:
    """Rows of one uuid are one item: `[X]` of each template becomes the subject, `[Y]` becomes `[MASK]`.

    Wordings are the manual templates in their order, then automatic ones, drawn with the uuid as seed.

    Args:
        path: A folder that `save_to_disk` wrote, a name on the hub, or JSON lines (`*.jsonl`) with the test items.
        config_name: Which of several configurations of a data set on the hub.
        split: The split that is divided into test items and others.
        examples_path: With JSON lines: those to draw examples from. A table has examples of its own.
        uuid_column: The column of uuids; the others name those below.
        template_column: Texts with `[X]` and `[Y]`.
        subject_column: What `[X]` stands for.
        answers_column: Lists of names of the object.
        manual_column: Whether a person wrote the template.
        manual: At most how many manual templates are taken.
        automatic: At most how many automatic ones.
        total: At most how many of both together, drawn with the uuid as seed, in their order; None for all.
        num_test: How many items are drawn for the test; None takes all, and leaves none for examples.
        num_examples: How many of the others are drawn as examples.
        seed: Of these two draws.
        prompts: How prompts are worded.

    Raises:
        ValueError: A number is impossible; and by its methods, if data set, split or column do not exist, or a number
            asks for more items than there are.
        ImportError: By its methods, if `datasets` is not installed.
    """

    def __init__(
        self,
        *,
        path: str,
        config_name: str | None,
        split: str,
        examples_path: str | None,
        uuid_column: str,
        template_column: str,
        subject_column: str,
        answers_column: str,
        manual_column: str,
        manual: int,
        automatic: int,
        total: int | None,
        num_test: int | None,
        num_examples: int,
        seed: int,
        prompts: PromptStyle,
    ) -> None:
        for name, number in (("manual", manual), ("auto", automatic)):
            if number < 0:
                raise ValueError(f"fusion.sample.{name}={number}: it must be at least 0")
        if manual + automatic == 0 or (total is not None and total < 1):
            raise ValueError(
                f"fusion.sample.manual={manual}, auto={automatic}, total={total} leave no wording; valid: at least one"
            )
        if num_examples and (examples_path is None if is_json_lines(path) else num_test is None):
            needed = "examples_path" if is_json_lines(path) else "num_test"
            raise ValueError(
                f"nothing is left that fusion.data.num_examples={num_examples} could be drawn from; give "
                f"fusion.data.{needed}, or set num_examples to 0"
            )
        self.path = path
        self.config_name = config_name
        self.split = split
        self.examples_path = examples_path
        self.columns = {
            "uuid_column": uuid_column,
            "template_column": template_column,
            "manual_column": manual_column,
            "subject_column": subject_column,
            "answers_column": answers_column,
        }
        self.manual = manual
        self.automatic = automatic
        self.total = total
        self.num_test = num_test
        self.num_examples = num_examples
        self.seed = seed
        self.prompts = prompts

    def test_items(self) -> list[Item]:
        """The items of the test, in the order of their uuids; or those of the file."""
        return read_items(self.path) if is_json_lines(self.path) else self._items(self._test_uuids)

    def example_items(self) -> list[Item]:
        """The drawn examples, none of which is in the test."""
        if not self.num_examples:
            return []
        if is_json_lines(self.path):
            assert self.examples_path is not None
            return draw_examples(read_items(self.examples_path), self.test_items(), self.num_examples, self.seed)
        tested = set(self._test_uuids)
        others = [uuid for uuid in sorted(self._facts) if uuid not in tested]
        return self._items(draw(others, self.num_examples, self.seed, field="num_examples"))

    @cached_property
    def _table(self) -> "Dataset":
        tables = load_tables(self.path, self.config_name, field="fusion.data.path")
        if self.split not in tables:
            raise ValueError(f"fusion.data.split={self.split!r} is not in {self.path}; valid: {', '.join(tables)}")
        check_columns(tables[self.split], self.columns, self.path)
        manual = self.columns["manual_column"]
        if getattr(tables[self.split].features[manual], "dtype", None) != "bool":
            raise ValueError(f"fusion.data.manual_column={manual!r} of {self.path} holds no truth values")
        return tables[self.split].select_columns(list(self.columns.values()))

    @cached_property
    def _facts(self) -> dict[str, _Fact]:
        """All facts by their uuid. The data set has millions of rows: subjects and answers are read later, of few."""
        uuid_column, template_column, manual_column = list(self.columns.values())[:3]
        facts: dict[str, _Fact] = {}
        start = 0
        for rows in self._table.select_columns([uuid_column, template_column, manual_column]).iter(_ROWS_AT_ONCE):
            columns = zip(rows[uuid_column], rows[template_column], rows[manual_column], strict=True)
            for number, (uuid, template, is_manual) in enumerate(columns, start=start):
                fact = facts.setdefault(uuid, _Fact(number))
                (fact.manual if is_manual else fact.automatic).append(template)
            start += len(rows[uuid_column])
        return facts

    @cached_property
    def _test_uuids(self) -> list[str]:
        uuids = sorted(self._facts)
        return uuids if self.num_test is None else sorted(draw(uuids, self.num_test, self.seed, field="num_test"))

    def _items(self, uuids: Sequence[str]) -> list[Item]:
        rows = self._table.select([self._facts[uuid].row for uuid in uuids])
        return [self._item(uuid, row) for uuid, row in zip(uuids, rows, strict=True)]

    def _item(self, uuid: str, row: dict[str, Any]) -> Item:
        fact = self._facts[uuid]
        subject, answers = row[self.columns["subject_column"]], row[self.columns["answers_column"]]
        automatic = list(dict.fromkeys(fact.automatic))
        drawn = draw(automatic, min(self.automatic, len(automatic)), uuid, field="automatic")
        templates = [*list(dict.fromkeys(fact.manual))[: self.manual], *drawn]
        if self.total is not None and self.total < len(templates):
            kept = draw(range(len(templates)), self.total, uuid, field="total")
            templates = [templates[index] for index in sorted(kept)]
        return Item(uuid, answers, [fill_template(template, subject, uuid) for template in templates])


def fill_template(template: str, subject: str, uuid: str) -> str:
    """A template with its subject and `[MASK]`; ValueError, which names the uuid, if it has no places for them."""
    if not isinstance(subject, str) or "[X]" not in template or "[Y]" not in template:
        raise ValueError(f"item {uuid!r}: template {template!r} needs [X] and [Y], and the subject {subject!r} a text")
    return template.replace("[Y]", "[MASK]").replace("[X]", subject)
