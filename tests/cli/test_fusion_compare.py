"""The command `fusion-compare`: methods side by side, from their files or from a model."""

import json

import numpy as np
import pytest
from PIL import Image

from flextok.cli import main
from flextok.fusion.results import read_results, write_results

TRUTH = ["paris", "rome", "madrid", "lima", "quito", "oslo"]


def row(number, prediction, **more):
    lemmas = {"predict_lemma": prediction.split(), "answer_lemmas": [[TRUTH[number]]]}
    texts = {"prediction": prediction, "generation": f"{prediction}\n"}
    return {"uuid": f"q{number}", "paraphrases": ["?"], "answers": [TRUTH[number]], **texts, **lemmas, **more}


def write(path, predictions, **config):
    rows = [row(number, text) for number, text in enumerate(predictions)]
    write_results(path, rows, {"method": path.stem.partition("-")[0], "lemmatizer": "simple", **config})
    return str(path)


@pytest.fixture
def files(tmp_path):
    measured = {"questions": 2, "prompt_tokens": 30, "new_tokens": 4, "seconds": 0.5}
    fusion = write(tmp_path / "fusion-5.feather", [*TRUTH[:4], "the oslo", "oslo city"], measured=measured)
    origin = write(tmp_path / "origin-5.parquet", [*TRUTH[:2], "rome", "rome", "rome", "oslo city"])
    return [fusion, origin]


def compared(capsys, tmp_path, *arguments):
    out = tmp_path / "out" / "c.json"
    assert main(["fusion-compare", *arguments, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert str(out.with_suffix(".png")) in text
    assert len(np.unique(np.asarray(Image.open(out.with_suffix(".png"))).reshape(-1, 4), axis=0)) > 20
    return text, json.loads(out.read_text())


def test_numbers_of_two_files(files, tmp_path, capsys):
    text, found = compared(capsys, tmp_path, "--files", *files)
    assert (found["num_questions"], found["num_left_out"], found["reference"]) == (6, 0, "origin-5")
    fusion, origin = found["methods"]
    assert (fusion["name"], origin["name"]) == ("fusion-5", "origin-5")
    assert fusion["accuracy"]["exact"]["mean"] == pytest.approx(4 / 6)
    assert fusion["accuracy"]["contains"]["mean"] == pytest.approx(5 / 6)
    assert origin["accuracy"]["exact"]["mean"] == pytest.approx(2 / 6)
    assert fusion["difference"]["exact"]["mean"] == pytest.approx(2 / 6)
    assert fusion["difference"]["contains"]["mean"] == pytest.approx(2 / 6)
    assert origin["difference"]["exact"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    for interval in (fusion["accuracy"]["exact"], fusion["difference"]["exact"]):
        assert 0 <= interval["low"] < interval["mean"] < interval["high"] <= 1
    # Four of six answers are right, so chance is that of a binomial with six draws.
    assert fusion["accuracy"]["exact"]["low"] == pytest.approx(2 / 6)
    assert fusion["accuracy"]["exact"]["high"] == 1.0
    assert (fusion["prompt_tokens"], fusion["new_tokens"], fusion["seconds"]) == (15.0, 2.0, 0.25)
    assert origin["seconds"] is None
    assert found["agreement"] == [[1.0, 0.5], [0.5, 1.0]]
    lines = [line.split() for line in text.splitlines()]
    assert next(line for line in lines if line[:1] == ["fusion-5"])[:4] == ["fusion-5", "0.667", "[0.333,", "1.000]"]
    assert next(line for line in lines if line[:1] == ["origin-5"])[-3:] == ["-", "-", "-"]
    assert ["fusion-5", "1.00", "0.50"] in lines


def test_wordings_of_a_question_count_together(files, tmp_path, capsys):
    rows = [
        row(number, text, variant=variant, paraphrase="?", confidence=0.5)
        for number in range(6)
        for variant, text in enumerate([TRUTH[number], "rome", "nothing"][: 3 if number else 1])
    ]
    path = tmp_path / "per_prompt-3.feather"
    write_results(path, rows, {"method": "per_prompt", "lemmatizer": "simple"})
    _, found = compared(capsys, tmp_path, "--files", *files, str(path))
    # Of the second question, whose answer is rome, two wordings are right.
    assert found["methods"][2]["accuracy"]["exact"]["mean"] == pytest.approx((1 + 2 / 3 + 4 / 3) / 6)
    assert found["agreement"][2][2] == pytest.approx((1 + 5 / 9 + 4 * 3 / 9) / 6)
    assert found["agreement"][1][2] == found["agreement"][2][1]


def test_only_common_questions_are_compared(files, tmp_path, capsys):
    short = write(tmp_path / "avg-5.feather", TRUTH[:3])
    text, found = compared(capsys, tmp_path, "--files", *files, short)
    assert (found["num_questions"], found["num_left_out"]) == (3, 3)
    assert "3 questions, 3 that not all answer left out" in text
    single = write(tmp_path / "max-5.feather", TRUTH[:1])
    _, found = compared(capsys, tmp_path, "--files", single, files[0])
    assert found["methods"][0]["accuracy"]["exact"] == {"mean": 1.0, "low": None, "high": None}


def test_files_without_lemmas_get_simple_ones(tmp_path, capsys):
    for name, prediction in (("a", "Paris!"), ("b", "It is PARIS.")):
        bare = row(0, prediction)
        del bare["predict_lemma"], bare["answer_lemmas"]
        write_results(tmp_path / f"{name}.feather", [bare])
    _, found = compared(capsys, tmp_path, "--files", str(tmp_path / "a.feather"), str(tmp_path / "b.feather"))
    assert [m["accuracy"][mode]["mean"] for m in found["methods"] for mode in ("exact", "contains")] == [1, 1, 0, 1]
    assert found["reference"] == "a"


def test_files_of_one_name_are_told_apart(files, tmp_path, capsys):
    for folder in ("deep/other", "other"):
        (tmp_path / folder).mkdir(parents=True)
    deep, other = (write(tmp_path / folder / "fusion-5.feather", TRUTH) for folder in ("deep/other", "other"))
    _, found = compared(capsys, tmp_path, "--files", files[0], other)
    assert [row["name"] for row in found["methods"]] == [f"{tmp_path.name}/fusion-5", "other/fusion-5"]
    _, found = compared(capsys, tmp_path, "--files", deep, other)
    assert [row["name"] for row in found["methods"]] == [deep, other]


def test_methods_are_run_once_and_taken_from_their_files(toy_questions, tmp_path, capsys, monkeypatch):
    overrides = [*toy_questions, f"fusion.out={tmp_path}", "fusion.weights=uniform", "fusion.confidence_samples=2"]
    methods = "origin,avg,max,weighted_avg,weighted_max,per_prompt,fusion"
    assert main(["fusion-compare", *overrides, "--methods", methods]) == 0
    printed = capsys.readouterr()
    # Said once, not for every method.
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["name"] for row in found["methods"]] == [f"{name}-3" for name in methods.split(",")]
    by_name = {row["name"]: row for row in found["methods"]}
    assert by_name["weighted_max-3"]["prompt_tokens"] == by_name["origin-3"]["prompt_tokens"]
    assert by_name["fusion-3"]["prompt_tokens"] < by_name["avg-3"]["prompt_tokens"]
    assert by_name["avg-3"]["prompt_tokens"] == by_name["per_prompt-3"]["prompt_tokens"]
    # Equal weights: the mean, and the first wording.
    numbers = [row["name"] for row in found["methods"]]
    agreement = np.array(found["agreement"])
    assert agreement[numbers.index("avg-3"), numbers.index("weighted_avg-3")] == 1
    assert agreement[numbers.index("origin-3"), numbers.index("weighted_max-3")] == 1
    assert agreement[numbers.index("origin-3"), numbers.index("avg-3")] < 1
    assert (agreement == agreement.T).all()
    assert all(row["confidence"] is not None for row in read_results(tmp_path / "per_prompt-3.feather"))

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("flextok.fusion.language_model.load_language_model", load)
    assert main(["fusion-compare", *overrides, "--methods", methods]) == 0
    assert capsys.readouterr().out == printed.out


def test_answers_made_with_other_settings_are_not_taken(toy_questions, tmp_path, capsys):
    overrides = [*toy_questions, f"fusion.out={tmp_path}", "fusion.limit=2"]
    assert main(["fusion-compare", *overrides, "--methods", "origin,fusion"]) == 0
    assert main(["fusion-compare", *overrides, "fusion.seed=1", "--methods", "avg,fusion"]) == 1
    assert "fusion-3.feather was made with seed=0, this run has 1" in capsys.readouterr().err
    # And nothing was run before that was found.
    assert not (tmp_path / "avg-3.feather").exists()
    assert (
        main(["fusion-compare", *overrides, "fusion.seed=1", "fusion.overwrite=true", "--methods", "avg,fusion"]) == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fusion"], "--methods fusion: valid are two or more"),
        (["--methods", "fusion,fusion"], "valid are two or more, and each once"),
        (["--methods", "fusion,mean"], "fusion.method='mean' cannot be used; valid: fusion"),
        (["--methods", "fusion,weighted_avg"], "fusion.method=weighted_avg needs fusion.weights"),
        (["fusion.method=avg"], "fusion.method: this command runs several; valid: --methods"),
        (["--out", "report.html"], "--out report.html: valid is a name that ends in .json"),
        (["fusion.limit=2", "--files", "a.feather"], "--files takes files as they are"),
        (["--files", "a.feather"], "a.feather: there is no such file"),
        (["--files", "a.csv", "b.csv"], "the suffix '.csv' is unknown"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fusion-compare", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_compared(files, tmp_path, capsys):
    assert main(["fusion-compare", "--files", files[0]]) == 1
    assert "valid are two or more" in capsys.readouterr().err
    assert main(["fusion-compare", "--files", files[0], files[0]]) == 1
    assert "each once" in capsys.readouterr().err
    spacy = write(tmp_path / "avg-5.feather", TRUTH, lemmatizer="spacy/en_core_web_lg")
    assert main(["fusion-compare", "--files", files[0], spacy]) == 1
    assert "lemmas are of different lemmatisers" in capsys.readouterr().err
    elsewhere = tmp_path / "max-5.feather"
    write_results(elsewhere, [row(0, "paris") | {"uuid": "other"}], {"lemmatizer": "simple"})
    assert main(["fusion-compare", "--files", files[0], str(elsewhere)]) == 1
    assert "have no question in common" in capsys.readouterr().err
    write_results(tmp_path / "empty.feather", [])
    assert main(["fusion-compare", "--files", files[0], str(tmp_path / "empty.feather")]) == 1
    assert "holds no answers" in capsys.readouterr().err
