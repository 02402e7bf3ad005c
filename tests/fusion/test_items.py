"""Reading items from JSON lines, and choosing among their wordings."""

import json

import pytest

from flextok.fusion.items import Item, read_items, select_wordings

GOOD = {"uuid": "a", "answers": ["Paris"], "paraphrases": ["capital of France?", "where is France governed?"]}


def write_lines(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def items(*counts):
    return [Item(f"item{n}", ["x"], [f"wording {k}" for k in range(count)]) for n, count in enumerate(counts)]


def test_items_are_read_in_their_order_and_other_fields_left_alone(tmp_path):
    file = write_lines(tmp_path / "items.jsonl", GOOD, "", GOOD | {"uuid": "b", "source": {"seed": 1}})
    assert read_items(file) == [Item(**GOOD), Item(**GOOD | {"uuid": "b"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "is a list, not an object"),
        ({"uuid": "b", "answers": ["x"]}, "the field paraphrases is missing; found: uuid, answers"),
        (GOOD | {"uuid": 7}, "uuid=7"),
        (GOOD | {"uuid": ""}, "uuid=''"),
        (GOOD | {"uuid": "b", "answers": "Paris"}, "answers='Paris' of item 'b' is no list of texts"),
        (GOOD | {"uuid": "b", "answers": []}, "answers=[] of item 'b'"),
        (GOOD | {"uuid": "b", "paraphrases": []}, "paraphrases=[] of item 'b'"),
        (GOOD | {"uuid": "b", "paraphrases": ["x", " "]}, "paraphrases=['x', ' '] of item 'b'"),
        (GOOD | {"uuid": "b", "paraphrases": ["x", 3]}, "paraphrases=['x', 3] of item 'b' is no list of texts"),
        (GOOD, "uuid='a' is that of line 1, too"),
    ],
)
def test_a_broken_line_is_named_with_its_field(tmp_path, line, message):
    file = write_lines(tmp_path / "items.jsonl", GOOD, line)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read_items(file)
    assert str(raised.value).startswith(f"{file}, line 2: ")
    assert message in str(raised.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "items.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"uuid": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: is no JSON"):
        read_items(tmp_path / "items.jsonl")


def test_a_separator_of_lines_inside_a_text_ends_no_line(tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps(GOOD | {"answers": ["a\u2028b\x85c"]}, ensure_ascii=False) + "\n")
    assert read_items(tmp_path / "items.jsonl")[0].answers == ["a\u2028b\x85c"]


def test_no_file_and_no_item_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_items(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="holds no item"):
        read_items(write_lines(tmp_path / "items.jsonl", ""))


def test_the_first_wordings_are_taken():
    assert [item.paraphrases for item in select_wordings(items(3, 2), num_paraphrases=2)] == [
        ["wording 0", "wording 1"]
    ] * 2


def test_items_with_fewer_wordings_keep_all_and_one_warning_says_so(caplog):
    chosen = select_wordings(items(3, 1, 2), num_paraphrases=3)
    assert [len(item.paraphrases) for item in chosen] == [3, 1, 2]
    (record,) = caplog.records
    assert "2 of 3 items have fewer than num_paraphrases=3" in record.getMessage()
    assert "the fewest are 1, of item item1" in record.getMessage()


def test_chosen_wordings_come_in_the_order_asked_for():
    assert select_wordings(items(4), num_paraphrases=1, indices=[3, 0])[0].paraphrases == ["wording 3", "wording 0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_paraphrases": 0}, "at least 1"),
        ({"indices": []}, "selects no wording"),
        ({"indices": [0, 2]}, "item 'item1' has 2 wordings; valid: 0 to 1"),
        ({"indices": [-1]}, "valid: 0 to 2"),
    ],
)
def test_a_choice_that_cannot_be_made_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        select_wordings(items(3, 2), **{"num_paraphrases": 1, **options})
