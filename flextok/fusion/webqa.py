"""Web questions: a table of questions and answers from Hugging Face `datasets`, or local JSON lines."""

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flextok.fusion.items import Item, read_items
from flextok.fusion.prompts import PromptStyle
from flextok.fusion.sources import check_columns, draw_examples, is_json_lines
from flextok.hub_tables import load_tables

if TYPE_CHECKING:
    from datasets import Dataset


class WebQAItems:
    """Questions of which the first wording is the original; other wordings are columns, or made by `fusion-paraphrase`.

    The uuid is the MD5 of the question in hexadecimal digits. A question that comes twice is one item with the answers
    of both.

    Args:
        path: A folder that `save_to_disk` wrote, a name on the hub, or JSON lines (`*.jsonl`) with the test items.
        config_name: Which of several configurations of a data set on the hub.
        test_split: The questions to answer.
        example_split: Those that examples are drawn from.
        examples_path: Where these are, again a folder, a name on the hub or JSON lines; None if it is `path`.
        question_column: The column of questions.
        answers_column: The column of lists of answers.
        wording_prefix: Further wordings are in columns of this name and a number: `paraphrase1`, `paraphrase2`, ...
        num_examples: How many examples are drawn.
        seed: Of that draw.
        prompts: How prompts are worded.

    Raises:
        ValueError: By its methods, if data set, split or column do not exist, or there are too few examples.
        ImportError: Likewise, if `datasets` is not installed.
    """

    def __init__(
        self,
        *,
        path: str,
        config_name: str | None,
        test_split: str,
        example_split: str,
        examples_path: str | None,
        question_column: str,
        answers_column: str,
        wording_prefix: str,
        num_examples: int,
        seed: int,
        prompts: PromptStyle,
    ) -> None:
        if num_examples and examples_path is None and is_json_lines(path):
            raise ValueError(
                f"fusion.data.path={path} has no split that num_examples={num_examples} could be drawn from; give "
                "fusion.data.examples_path, or set fusion.data.num_examples=0"
            )
        self.path = path
        self.config_name = config_name
        self.test_split = test_split
        self.example_split = example_split
        self.examples_path = examples_path
        self.question_column = question_column
        self.answers_column = answers_column
        self.wording_prefix = wording_prefix
        self.num_examples = num_examples
        self.seed = seed
        self.prompts = prompts

    def test_items(self) -> list[Item]:
        """The items of the test split, or of the file."""
        return self._read(self.path, "test_split", self.test_split)

    def example_items(self) -> list[Item]:
        """The drawn examples."""
        if not self.num_examples:
            return []
        pool = self._read(self.examples_path or self.path, "example_split", self.example_split)
        return draw_examples(pool, self.test_items(), self.num_examples, self.seed)

    def _read(self, path: str, field: str, split: str) -> list[Item]:
        if is_json_lines(path):
            return read_items(path)
        tables = load_tables(path, self.config_name, field="fusion.data.path")
        if split not in tables:
            raise ValueError(f"fusion.data.{field}={split!r} is not in {path}; valid: {', '.join(tables)}")
        return self._items(tables[split], where=path)

    def _items(self, table: "Dataset", *, where: str) -> list[Item]:
        named = {"question_column": self.question_column, "answers_column": self.answers_column}
        check_columns(table, named, where)
        pattern = re.compile(rf"{re.escape(self.wording_prefix)}(\d+)")
        numbered = {int(match[1]): name for name in table.column_names if (match := pattern.fullmatch(name))}
        wordings = [numbered[number] for number in sorted(numbered)]
        items: dict[str, Item] = {}
        for number, row in enumerate(table.select_columns([*named.values(), *wordings])):
            try:
                item = self._item(row, wordings)
            except ValueError as error:
                raise ValueError(f"{where}, row {number}: {error}") from error
            if item.uuid in items:
                answers = [*items[item.uuid].answers, *item.answers]
                item = Item(item.uuid, list(dict.fromkeys(answers)), items[item.uuid].paraphrases)
            items[item.uuid] = item
        return list(items.values())

    def _item(self, row: Mapping[str, Any], wordings: list[str]) -> Item:
        question = row[self.question_column]
        if not isinstance(question, str):
            raise ValueError(f"{self.question_column}={question!r} is no text")
        # Models now and then give no wording at all.
        others = [text for text in (row[name] for name in wordings) if text is not None and text.strip()]
        return Item(question_uuid(question), row[self.answers_column], [question, *others])


def question_uuid(question: str) -> str:
    """MD5 of a question, 32 hexadecimal digits."""
    return hashlib.md5(question.encode(), usedforsecurity=False).hexdigest()
