"""The card of a model: what it is, what was measured, and nothing measured of other weights."""

import json
import socket

import pytest
from huggingface_hub import HfApi, ModelCard

from flextok import FlexTokFromHub
from flextok.cli import main
from flextok.utils.model_card import model_card
from tests.end_to_end.support import evaluate


@pytest.fixture(scope="module")
def model(released):
    return FlexTokFromHub.from_pretrained(released("mask_token")[1])


@pytest.fixture(scope="module")
def report(released, tmp_path_factory):
    """An evaluation of that model: the file, and what it holds."""
    folder = tmp_path_factory.mktemp("report")
    return folder / "metrics.json", evaluate(released("mask_token")[0], folder)


def test_a_card_says_what_the_model_is_and_that_nothing_was_measured(model):
    card = model_card(model)
    assert card.data.library_name == "flextok"
    assert card.data.license is None
    assert f"| tokens | up to {model.num_registers} |" in card.text
    assert f"| codebook | {model.regularizer.codebook_size:,} ids |" in card.text
    assert "Nothing yet" in card.text
    assert "None was stated" in card.text


def test_a_card_has_the_measured_table_the_protocol_and_the_licence(model, report):
    file, metrics = report
    card = model_card(model, metrics=file, license="apache-2.0")
    assert card.data.license == "apache-2.0"
    table = [line.strip("|").split(" | ") for line in card.text.splitlines() if line.startswith("| ") and "dB" in line]
    assert [title.strip() for title in table[0]][:4] == ["keep_k", "bits", "PSNR dB", "± se"]
    for row in metrics["results"]:
        assert f"| {row['keep_k']} | {row['bits_per_image']:.1f} | {row['psnr']:.2f} |" in card.text
    assert json.loads(card.text.partition("```json\n")[2].partition("```")[0]) == metrics["protocol"]
    assert "`apache-2.0`" in card.text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"results": []}'])
def test_a_file_that_is_no_evaluation_is_refused(model, tmp_path, content):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics: .*valid: a metrics.json that eval.py wrote"):
        model_card(model, metrics=path)


def test_what_is_pushed_is_weights_config_and_card(model, report, tmp_path, monkeypatch):
    pushed, about = {}, {"metrics": report[1], "license": "mit"}

    def upload(api, *, folder_path, repo_id, **options):
        pushed.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: type("Repo", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    url = model.push_to_hub("somebody/digits", model_card_kwargs=about)
    assert url == "https://hub/somebody/digits"
    assert pushed.keys() == {"model.safetensors", "config.json", "README.md"}
    model.save_pretrained(tmp_path, model_card_kwargs=about)
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert pushed.keys() == saved.keys()
    # The order of names in the header of a safetensors file is never the same.
    assert all(pushed[name] == saved[name] for name in ("config.json", "README.md"))
    assert len(pushed["model.safetensors"]) == len(saved["model.safetensors"])
    assert ModelCard(pushed["README.md"].decode()).data.license == "mit"


def test_a_folder_is_loaded_without_a_network(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)

    def refuse(*args, **options):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = FlexTokFromHub.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_an_export_has_the_numbers_of_its_run_unless_they_are_of_other_weights(released, report, tmp_path, caplog):
    run, export = released("mask_token")
    assert "Nothing yet" in (export / "README.md").read_text()
    file, measured = report
    given = ("--metrics", str(file), "--license", "mit")
    assert main(["export", str(run), str(tmp_path / "given"), *given]) == 0
    assert measured["protocol"]["weights_sha256"] in (tmp_path / "given" / "README.md").read_text()

    last = run / "checkpoints" / "last.ckpt"
    place = run / "evaluation" / "metrics.json"
    place.parent.mkdir()
    place.write_text(json.dumps(measured))
    try:
        assert main(["export", str(run), str(tmp_path / "found")]) == 0
        assert measured["protocol"]["weights_sha256"] in (tmp_path / "found" / "README.md").read_text()
        assert main(["export", str(last), str(tmp_path / "raw"), "--weights", "raw"]) == 0
        assert "Nothing yet" in (tmp_path / "raw" / "README.md").read_text()
        assert "it is of other weights" in caplog.text
    finally:
        place.unlink()
        place.parent.rmdir()


def test_a_card_is_not_replaced_unasked(released, tmp_path, capsys):
    run, _ = released("mask_token")
    (tmp_path / "README.md").write_text("mine")
    assert main(["export", str(run), str(tmp_path)]) == 1
    assert "README.md exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert main(["export", str(run), str(tmp_path), "--overwrite"]) == 0
    assert (tmp_path / "README.md").read_text() != "mine"
