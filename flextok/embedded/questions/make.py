"""Write train.jsonl and test.jsonl from the facts (.csv) and the wordings (wordings.yaml) beside this file.

  python -m flextok.embedded.questions.make [FOLDER]

Both files ask for the same facts. A fact is learned in `LEARNED` of the wordings of its relation, drawn for this fact.
It is tested in `KNOWN` others of them, which were learned for other facts only, and in `NEW` that no fact was learned
in. No question of the test occurs in training.
"""

import csv
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

HERE = Path(__file__).parent
FACTS = ("countries", "elements", "books")
LEARNED, KNOWN, NEW = 4, 1, 5


class Fact(NamedTuple):
    """Any one of the answers is right; the first is learned."""

    relation: str
    subject: str
    answers: list[str]


def facts() -> Iterator[Fact]:
    """In a table the first column is the subject, every other one a relation; `|` separates answers."""
    for name in FACTS:
        with (HERE / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                (_, subject), *relations = row.items()
                yield from (Fact(relation, subject, cell.split("|")) for relation, cell in relations if cell)


def make_items() -> dict[str, list[dict[str, object]]]:
    """The items of `train` and `test`; the same ones every time."""
    wordings = yaml.safe_load((HERE / "wordings.yaml").read_text(encoding="utf-8"))
    items: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for fact in facts():
        rng = random.Random(f"{fact.relation} of {fact.subject}")
        known = rng.sample(wordings[fact.relation]["train"], LEARNED + KNOWN)
        tested = known[LEARNED:] + rng.sample(wordings[fact.relation]["test"], NEW)
        rng.shuffle(tested)
        items["train"].append(_item(fact, known[:LEARNED]))
        items["test"].append(_item(fact, tested))
    return items


def _item(fact: Fact, wordings: list[str]) -> dict[str, object]:
    questions = [_capitalised(wording.format(x=fact.subject)) for wording in wordings]
    name = hashlib.md5(questions[0].encode(), usedforsecurity=False).hexdigest()
    return {"uuid": name, "answers": fact.answers, "paraphrases": questions}


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def main(folder: Path) -> None:
    """Write both files."""
    for name, items in make_items().items():
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
