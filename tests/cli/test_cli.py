"""The commands `describe` and `export`, from the command line to what they print and write."""

import logging
import re
import shutil
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from flextok.cli import COMMANDS, main
from flextok.cli.module_table import describe_value, keys_of
from tests.support import RECORDED

TINY = ["model=tiny", "vae=pixel", "data=digits"]


def printed(capsys, *argv):
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def line_of(table, name):
    return next(line.split() for line in table.splitlines() if line.startswith(f"{name} "))


def test_help_lists_the_commands_without_waiting_for_torch():
    program = (
        "import sys; from flextok.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'hydra', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"flextok {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["descibe"], ["export", "only_one"], ["export", "a", "b", "--weights", "x"]])
def test_misuse_ends_with_status_2(argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["describe", "no/such/path"], "neither an existing path nor an override"),
        (["describe", "model=tinny"], "tinny"),
        (["describe", "."], "holds neither a run"),
        (["export", "no/such/run", "out"], "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_status_1(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_traceback_on_request():
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "describe", "no/such/path"])


def test_describe_prints_keys_shapes_and_sizes_of_a_config(capsys, caplog):
    table = printed(capsys, "describe", *TINY, "dropout=mask_token")
    assert "dec_nested_dropout" in table
    assert line_of(table, "dec_nested_dropout")[1] == "MaskedNestedDropout"
    assert line_of(table, "enc_channels_to_last")[2:4] == ["vae_latents", "vae_latents_bhwc"]
    totals = {name: int(line_of(table, name)[1].replace(",", "")) for name in ("encoder", "decoder", "all")}
    assert totals["all"] == totals["encoder"] + totals["decoder"]
    assert not caplog.records, "a module cannot compute shapes alone"
    # The last module writes latents of the size that were put in.
    latents, reconstructed = line_of(table, "vae"), line_of(table, "dec_channels_to_first")
    assert reconstructed[3] == "vae_latents_reconst"
    assert reconstructed[4:8] == latents[4:8]


def test_describe_follows_the_dropout_override(capsys):
    table = printed(capsys, "describe", *TINY, "dropout=attention_mask")
    assert line_of(table, "dec_nested_dropout")[1] == "AttentionMaskedNestedDropout"
    assert line_of(table, "dec_seq_packer")[1] == "NestedDropoutSequencePacker"


@pytest.mark.parametrize(
    ("model", "encoder", "total"),
    [
        ("flextok_d12_d12", 85_382_406, 257_830_726),
        ("flextok_d18_d18", 287_326_086, 865_913_542),
        ("flextok_d18_d28", 287_326_086, 2_457_061_830),
    ],
)
def test_described_sizes_are_the_published_ones(model, encoder, total, capsys):
    table = printed(capsys, "describe", f"model={model}", "vae=kl", "data.image_size=256", "dropout=mask_token")
    assert line_of(table, "encoder")[1] == f"{encoder:,}"
    assert line_of(table, "all")[1] == f"{total:,}"
    assert "dec_patches [1, 16, 16, " in table


@pytest.mark.parametrize("path", ["tiny_flextok/model.safetensors", "tiny_flextok"])
def test_describe_reads_exported_models(path, capsys):
    table = printed(capsys, "describe", str(RECORDED / path))
    assert "vae_latents [1, 4, 8, 8]" in table
    assert "enc_registers [1, 16, 6]" in table


def test_describe_shows_how_far_a_broken_model_gets(capsys, caplog):
    with caplog.at_level(logging.WARNING):
        override = "model.decoder.module_dict.dec_from_latents.read_key=nobody_writes_this"
        table = printed(capsys, "describe", *TINY, override)
    assert "shapes end at dec_from_latents: KeyError: 'nobody_writes_this'" in caplog.text
    assert line_of(table, "dec_from_latents")[4] == "-"


def test_describe_reads_a_run(run_folder, capsys):
    config = OmegaConf.load(run_folder / "config.yaml")
    rest = {"data": {"image_size": 8}, "latent": {"downsample": 1, "channels": 3}}
    OmegaConf.save(OmegaConf.merge(config, rest), run_folder / "config.yaml")
    assert "vae_latents [1, 3, 8, 8]" in printed(capsys, "describe", str(run_folder))


@pytest.fixture
def hostile_run(run_folder, tmp_path):
    """A run, and a checkpoint alone, whose config copies a file; with the file that it would make."""
    (tmp_path / "source").write_text("")
    copied = tmp_path / "copied"
    call = {"_target_": "shutil.copy", "src": str(tmp_path / "source"), "dst": str(copied)}
    config = OmegaConf.to_container(OmegaConf.load(run_folder / "config.yaml"))
    config |= {"data": {"image_size": 8}, "latent": {"downsample": 1, "channels": 3}}
    config["model"]["encoder"]["module_dict"]["enc_own"] = call
    OmegaConf.save(OmegaConf.create(config), run_folder / "config.yaml")
    alone = tmp_path / "alone.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"model": call}}, alone)
    return run_folder, alone, copied


def test_the_config_of_a_run_runs_no_code(hostile_run, tmp_path, capsys):
    run, alone, copied = hostile_run
    for argv in (["export", run, tmp_path / "out"], ["export", alone, tmp_path / "out"], ["describe", run]):
        assert main([str(word) for word in argv]) == 1
        error = capsys.readouterr().err
        assert "_target_: 'shutil.copy' is refused" in error
        assert "trust" in error
    assert not copied.exists()


def test_a_run_of_ones_own_may_hold_other_modules_when_that_is_said(hostile_run, capsys):
    from flextok.training.checkpoints import load_run

    run, alone, copied = hostile_run
    with pytest.raises(AttributeError):  # what shutil.copy returns is no model
        load_run(alone, trust=True)
    assert copied.exists()
    copied.unlink()
    assert main(["describe", "--trust", str(run)]) == 1
    assert copied.exists()


def test_describe_refuses_what_cannot_belong_to_the_file(tmp_path, capsys):
    shutil.copytree(RECORDED / "tiny_flextok", tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(re.sub(r'"depth": \d+', '"depth": 1000000', text))
    assert main(["describe", str(tmp_path)]) == 1
    assert "depth: 1000000 is refused" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["", "checkpoints/last.ckpt"])
def test_an_exported_run_is_loaded_by_the_hub_class_and_the_loader(given, run_folder, tmp_path, capsys):
    from flextok import FlexTokFromHub
    from flextok.training.checkpoints import load_run
    from flextok.utils.checkpoint import load_metadata, load_model_from_safetensors

    out = tmp_path / "out"
    assert main(["export", str(run_folder / given), str(out)]) == 0
    expected = load_run(run_folder)[0].state_dict()
    for model in (FlexTokFromHub.from_pretrained(out), load_model_from_safetensors(out / "model.safetensors")):
        assert not model.training
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    packer = load_metadata(out / "model.safetensors")["decoder"]["module_dict"]["dec_seq_packer"]
    assert "drop_masked" not in packer
    assert packer["pad_to_multiple"] == 128
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_export_takes_the_averaged_weights_unless_told_otherwise(run_folder, tmp_path):
    from flextok.utils.checkpoint import load_safetensors

    for weights in ("ema", "raw"):
        assert main(["export", str(run_folder), str(tmp_path / weights), "--weights", weights]) == 0
    averaged, raw = (load_safetensors(tmp_path / w / "model.safetensors", False) for w in ("ema", "raw"))
    name = "encoder.module_dict.enc_register_module.registers"
    torch.testing.assert_close(averaged[name], raw[name] + 1)


def test_export_replaces_a_model_only_when_told_to(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(RECORDED / "tiny_flextok", out)
    before = (out / "config.json").read_text()
    assert main(["export", str(run_folder), str(out)]) == 1
    assert "exists" in capsys.readouterr().err
    assert (out / "config.json").read_text() == before
    assert main(["export", str(run_folder), str(out), "--overwrite"]) == 0
    assert (out / "config.json").read_text() != before


def test_keys_come_from_the_names_of_attributes():
    settings = {
        "read_key": "a",
        "x_read_keys": ["b", "c"],
        "y_read_write_key": "d",
        "z_write_key": None,
        "inner_seq_write_keys": ("e", "f"),
        "read_sizes_from_key": "g",
        "dim": 3,
    }
    assert keys_of(settings) == (["a", "b", "c", "d", "g"], ["d", "e", "f"])


def test_values_are_described_by_their_shapes():
    assert describe_value(torch.empty(2, 3)) == "[2, 3]"
    assert describe_value([torch.empty(1, 3)]) == "[1, 3]"
    assert describe_value([[torch.Size([4, 4]), torch.Size([16])]]) == "(((4, 4), (16,)))"
    assert describe_value([3]) == "(3)"
    assert describe_value(object()) == "object"
