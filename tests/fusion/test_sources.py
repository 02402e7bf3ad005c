"""Where items come from: local files, tables on disk in their original layout, the configs that choose them."""

import hashlib
import json
import random

import datasets
import pytest
from hydra.utils import instantiate

from flextok.config import compose
from flextok.fusion.items import Item
from flextok.fusion.myriadlama import fill_template
from flextok.fusion.prompts import MyriadPrompts, WebQAPrompts


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    """Tables that `datasets` converts lie below the folder of the test; global random numbers stay as they are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    state = random.getstate()
    yield
    assert random.getstate() == state


def source(name, **changes):
    changes = {f"fusion.{key.replace('__', '.')}": value for key, value in changes.items()}
    overrides = [f"{key}={'null' if value is None else value}" for key, value in changes.items()]
    return instantiate(compose([f"fusion/data={name}", *overrides], "fuse").fusion.data, _convert_="all")


def write_items(path, *uuids):
    lines = [{"uuid": uuid, "answers": [f"a {uuid}"], "paraphrases": [f"q {uuid}", f"r {uuid}"]} for uuid in uuids]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def uuids(items):
    return [item.uuid for item in items]


# --- JSON lines -------------------------------------------------------------------------------------------------------


def test_items_of_your_own(tmp_path):
    write_items(tmp_path / "test.jsonl", "a", "b")
    data = source("jsonl", data__path=tmp_path / "test.jsonl")
    assert uuids(data.test_items()) == ["a", "b"]
    assert data.example_items() == []
    assert isinstance(data.prompts, WebQAPrompts)


def test_examples_are_drawn_among_those_that_are_not_asked(tmp_path):
    write_items(tmp_path / "test.jsonl", "a", "b")
    write_items(tmp_path / "train.jsonl", *"abcdefgh")
    where = {"data__path": tmp_path / "test.jsonl", "data__examples_path": tmp_path / "train.jsonl"}
    drawn = uuids(source("jsonl", **where, data__num_examples=3).example_items())
    assert drawn == random.Random(42).sample("cdefgh", 3)
    assert drawn != uuids(source("jsonl", **where, data__num_examples=3, data__seed=1).example_items())
    with pytest.raises(ValueError, match=r"fusion\.data\.num_examples=7: valid are 0 to 6"):
        source("jsonl", **where, data__num_examples=7).example_items()


def test_examples_need_a_file_to_draw_from(tmp_path):
    with pytest.raises(Exception, match=r"num_examples=1 needs fusion\.data\.examples_path"):
        source("jsonl", data__path=tmp_path / "test.jsonl", data__num_examples=1)


def test_files_of_the_package_have_a_short_name(tmp_path, monkeypatch):
    from flextok import embedded

    (tmp_path / "questions").mkdir()
    write_items(tmp_path / "questions/test.jsonl", "a")
    write_items(tmp_path / "questions/train.jsonl", "a", "b")
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    data = source("questions", data__num_examples=1)
    assert uuids(data.test_items()) == ["a"]
    assert uuids(data.example_items()) == ["b"]
    assert data.prompts.texts(["x?"], []).full() == ["Q: x?\nA:"]


# --- WebQA ------------------------------------------------------------------------------------------------------------


def questions(*texts, **columns):
    rows = {"url": [f"http://x/{text}" for text in texts], "question": list(texts)}
    return datasets.Dataset.from_dict(rows | {"answers": [[f"answer to {text}", "x"] for text in texts]} | columns)


@pytest.fixture
def webqa(tmp_path):
    """The layout of the data set on the hub, with wordings in columns as its users add them."""
    wordings = {f"paraphrase{n}": [f"q{i} in wording {n}" for i in range(3)] for n in (10, 2, 1)}
    tables = {"train": questions(*(f"t{i}" for i in range(9))), "test": questions("q0", "q1", "q2", **wordings)}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "webqa")
    return tmp_path / "webqa"


def test_web_questions_from_disk(webqa):
    data = source("webqa", data__path=webqa)
    items = data.test_items()
    assert items[1] == Item(
        hashlib.md5(b"q1").hexdigest(),
        ["answer to q1", "x"],
        ["q1", "q1 in wording 1", "q1 in wording 2", "q1 in wording 10"],
    )
    assert len(items) == 3
    assert [item.paraphrases for item in data.example_items()] == [
        [text] for text in random.Random(42).sample([f"t{i}" for i in range(9)], 5)
    ]


def test_the_examples_of_reworded_questions_come_from_the_data_set(webqa, tmp_path):
    file = write_items(tmp_path / "reworded.jsonl", "a", hashlib.md5(b"t0").hexdigest())
    data = source("webqa", data__path=file, data__examples_path=webqa, data__num_examples=8)
    assert uuids(data.test_items())[0] == "a"
    assert {item.paraphrases[0] for item in data.example_items()} == {f"t{i}" for i in range(1, 9)}
    with pytest.raises(Exception, match=r"give fusion\.data\.examples_path, or set fusion\.data\.num_examples=0"):
        source("webqa", data__path=file)
    assert source("webqa", data__path=file, data__num_examples=0).example_items() == []


def test_a_question_that_comes_twice_is_one_item_with_all_answers(tmp_path):
    table = datasets.Dataset.from_dict({"question": ["q", "r", "q"], "answers": [["a"], ["b"], ["c", "a"]]})
    table.save_to_disk(tmp_path / "table")
    items = source("webqa", data__path=tmp_path / "table", data__test_split="train").test_items()
    assert [(item.paraphrases, item.answers) for item in items] == [(["q"], ["a", "c"]), (["r"], ["b"])]


def test_wordings_that_are_empty_are_left_out(tmp_path):
    table = questions("q0", "q1", paraphrase1=[None, " "], paraphrase2=["x", None])
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "table")
    items = source("webqa", data__path=tmp_path / "table").test_items()
    assert [item.paraphrases for item in items] == [["q0", "x"], ["q1"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_split": "dev"}, r"fusion\.data\.test_split='dev' is not in .*; valid: train, test"),
        (
            {"answers_column": "answer"},
            r"fusion\.data\.answers_column='answer' is not in .*; valid: one of url, question",
        ),
        ({"answers_column": "url"}, r"row 0: answers='http://x/q0' of item '.*' is no list of texts"),
        ({"question_column": "answers"}, r"row 0: answers=\[.*\] is no text"),
    ],
)
def test_a_table_that_does_not_fit_is_named_with_the_setting(webqa, changes, message):
    with pytest.raises(ValueError, match=message):
        source("webqa", data__path=webqa, **{f"data__{key}": value for key, value in changes.items()}).test_items()


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"fusion\.data\.path='.*missing' cannot be loaded: there is no such folder"):
        source("webqa", data__path=tmp_path / "missing").test_items()


def test_a_name_means_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, config_name):
        asked.append((path, config_name))
        return datasets.DatasetDict({"test": questions("q")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert len(source("webqa").test_items()) == 1
    assert asked == [("stanfordnlp/web_questions", None)]


# --- MyriadLAMA -------------------------------------------------------------------------------------------------------

NUM_FACTS, NUM_MANUAL, NUM_AUTOMATIC = 12, 6, 20


@pytest.fixture(scope="module")
def myriadlama(tmp_path_factory):
    """The layout of the data set on the hub, its rows in no order."""
    rows = [
        {
            "uuid": f"fact{fact:02}",
            "rel_uri": "P36",
            "sub_ent": f"[Y]{fact}" if fact == 3 else f"Land {fact}",
            "obj_aliases": [f"City {fact}", f"Town {fact}"],
            "template": f"{'manual' if number < NUM_MANUAL else 'auto'} {number}: [X] has the capital [Y].",
            "is_manual": number < NUM_MANUAL,
        }
        for number in range(NUM_MANUAL + NUM_AUTOMATIC)
        for fact in range(NUM_FACTS)
    ]
    datasets.disable_progress_bars()
    path = tmp_path_factory.mktemp("tables") / "myriad"
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def facts(path, **changes):
    return source("myriadlama", data__path=path, **{"data__num_test": 4, **changes})


def kinds(item):
    return [text.split(":")[0] for text in item.paraphrases]


def test_facts_become_items(myriadlama):
    data = facts(myriadlama)
    items = data.test_items()
    assert uuids(items) == sorted(random.Random(42).sample([f"fact{n:02}" for n in range(NUM_FACTS)], 4))
    number = int(items[0].uuid[-2:])
    assert items[0].answers == [f"City {number}", f"Town {number}"]
    assert items[0].paraphrases[0] == f"manual 0: Land {number} has the capital [MASK]."
    drawn = random.Random(items[0].uuid).sample(
        [f"auto {n}" for n in range(NUM_MANUAL, NUM_MANUAL + NUM_AUTOMATIC)], 15
    )
    assert kinds(items[0]) == [*(f"manual {n}" for n in range(5)), *drawn]
    assert isinstance(data.prompts, MyriadPrompts)


def test_examples_are_facts_that_are_not_asked(myriadlama):
    data = facts(myriadlama)
    tested, shown = uuids(data.test_items()), uuids(data.example_items())
    assert len(shown) == 5
    assert not set(shown) & set(tested)
    assert shown == uuids(facts(myriadlama).example_items())


@pytest.mark.parametrize(
    ("sample", "manual", "automatic"),
    [
        ({"manual": 2, "auto": 0}, 2, 0),
        ({"manual": 0, "auto": 3}, 0, 3),
        ({"manual": 50, "auto": 50}, NUM_MANUAL, NUM_AUTOMATIC),
    ],
)
def test_the_numbers_of_wordings(myriadlama, sample, manual, automatic):
    changes = {f"sample__{key}": value for key, value in sample.items()}
    for item in facts(myriadlama, **changes).test_items():
        assert [kind.split()[0] for kind in kinds(item)] == ["manual"] * manual + ["auto"] * automatic


def test_the_total_is_drawn_by_the_uuid_and_keeps_the_order(myriadlama):
    all_of_them = {item.uuid: kinds(item) for item in facts(myriadlama).test_items()}
    places = []
    for item in facts(myriadlama, sample__total=6).test_items():
        places.append([all_of_them[item.uuid].index(kind) for kind in kinds(item)])
        assert len(places[-1]) == 6
        assert places[-1] == sorted(places[-1])
    assert len({tuple(place) for place in places}) == 4
    assert [kinds(item) for item in facts(myriadlama, sample__total=99).test_items()] == list(all_of_them.values())


def test_all_facts_can_be_asked(myriadlama):
    data = facts(myriadlama, data__num_test=None, data__num_examples=0)
    assert len(data.test_items()) == NUM_FACTS
    assert data.example_items() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__num_test": 13}, r"fusion\.data\.num_test=13: valid are 0 to 12"),
        ({"data__num_examples": 9}, r"fusion\.data\.num_examples=9: valid are 0 to 8"),
        ({"data__num_test": None}, r"num_examples=5 could be drawn from; give fusion\.data\.num_test"),
        ({"data__split": "test"}, r"fusion\.data\.split='test' is not in .*; valid: train"),
        ({"data__subject_column": "sub"}, r"fusion\.data\.subject_column='sub' is not in .*; valid: one of uuid"),
        ({"data__manual_column": "template"}, r"fusion\.data\.manual_column='template' of .* holds no truth values"),
        ({"data__manual_column": "obj_aliases"}, "holds no truth values"),
        ({"sample__manual": 0, "sample__auto": 0}, "leave no wording"),
        ({"sample__total": 0}, "leave no wording"),
        ({"sample__auto": -1}, r"fusion\.sample\.auto=-1"),
    ],
)
def test_numbers_and_names_that_do_not_fit(myriadlama, changes, message):
    def items():
        data = facts(myriadlama, **changes)
        return data.test_items(), data.example_items()

    with pytest.raises(Exception, match=message):  # Hydra has an error of its own around those of building
        items()


def test_facts_from_local_files(tmp_path):
    write_items(tmp_path / "test.jsonl", "a", "b")
    write_items(tmp_path / "others.jsonl", "b", "c")
    where = {"data__examples_path": tmp_path / "others.jsonl", "data__num_examples": 1}
    data = facts(tmp_path / "test.jsonl", **where)
    assert uuids(data.test_items()) == ["a", "b"]
    assert uuids(data.example_items()) == ["c"]
    with pytest.raises(Exception, match=r"give fusion\.data\.examples_path"):
        facts(tmp_path / "test.jsonl")


def test_a_template_is_filled_once():
    assert fill_template("[X] lies in [Y].", "the [Y] valley", "a") == "the [Y] valley lies in [MASK]."
    for template, subject in (("[X] lies.", "it"), ("In [Y].", "it"), ("[X] in [Y]", None)):
        with pytest.raises(ValueError, match="item 'a': template"):
            fill_template(template, subject, "a")
