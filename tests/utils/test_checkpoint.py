"""Checkpoints: what is written comes back, and is written in the published form."""

import json
import os
import stat

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from flextok.utils import checkpoint
from flextok.utils.checkpoint import (
    load_metadata,
    load_model_from_safetensors,
    load_safetensors,
    sanitize_hydra_config,
    save_safetensors,
)
from flextok.utils.config_safety import ALLOWED_TARGETS
from flextok.utils.export import official_config
from flextok.utils.instantiate import instantiate_parts
from tests.support import LINEAR, RECORDED

TINY = RECORDED / "tiny_flextok"


@pytest.fixture
def tiny_config():
    return json.loads((TINY / "config.json").read_text())


def raw_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_published_metadata_is_the_published_config(tiny_config):
    tensors, config = load_safetensors(TINY / "model.safetensors")
    assert config == tiny_config
    assert list(config["decoder"]["module_dict"]) == list(tiny_config["decoder"]["module_dict"])
    assert load_safetensors(TINY / "model.safetensors", return_metadata=False).keys() == tensors.keys()


def test_what_is_written_is_text_for_text_the_published_file(tmp_path):
    tensors, config = load_safetensors(TINY / "model.safetensors")
    save_safetensors(tensors, tmp_path / "copy.safetensors", config)
    assert raw_metadata(tmp_path / "copy.safetensors") == raw_metadata(TINY / "model.safetensors")
    copies = load_safetensors(tmp_path / "copy.safetensors", return_metadata=False)
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
    assert copies.keys() == tensors.keys()


@pytest.mark.parametrize(
    "value",
    [
        1e-05,
        {"eps": 1e-05},
        {"sizes": (2, 2), "one": (1,), "none": ()},
        {"name": "None of these", "quote": 'it\'s "so"', "line": "a\nb"},
        "None",
        "1e-05",
        None,
        {f"layer_{i}": {"read_key": "x" * 40, "dims": [i] * 5} for i in range(300)},
        [1, 2.0, True, None, "a"],
        {},
    ],
    ids=lambda value: str(value)[:20],
)
def test_odd_values_come_back(tmp_path, value):
    save_safetensors({"w": torch.ones(1)}, tmp_path / "a.safetensors", {"value": value, "other": "text"})
    config = load_metadata(tmp_path / "a.safetensors")
    assert config == {"value": value, "other": "text"}
    assert repr(config["value"]) == repr(value)


def test_no_metadata_is_an_empty_config(tmp_path):
    save_safetensors({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    assert load_safetensors(tmp_path / "a.safetensors")[1] == {}
    with pytest.raises(ValueError, match="no config"):
        load_model_from_safetensors(tmp_path / "a.safetensors")


def test_dict_configs_are_resolved_on_writing(tmp_path):
    config = OmegaConf.create({"width": 8, "model": {"dim": "${width}", "sizes": [1, "${width}"]}})
    save_safetensors({"w": torch.ones(1)}, tmp_path / "a.safetensors", config.model)
    assert load_metadata(tmp_path / "a.safetensors") == {"dim": 8, "sizes": [1, 8]}


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"a": {"b": "${oc.env:HOME}"}}, r"a\.b"),
        ({"a": {"b": float("inf")}}, "'a'"),
        ({"a": {"b": object()}}, r"a\.b"),
        ({"a": {"_target_": "os.system"}}, r"a\._target_"),
        ({1: "a"}, "keys"),
    ],
)
def test_a_config_that_could_not_be_loaded_is_not_written(tmp_path, config, place):
    with pytest.raises(ValueError, match=place):
        save_safetensors({"w": torch.ones(1)}, tmp_path / "a.safetensors", config)
    assert list(tmp_path.iterdir()) == []


def test_shared_strided_and_sliced_tensors_are_written_by_value(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"base": base, "same": base, "turned": base.t(), "row": base[1], "column": base[:, 2], "empty": base[:0]}
    tensors |= {"half": base.to(torch.bfloat16), "parameter": nn.Parameter(base), "scalar": torch.tensor(3)}
    save_safetensors(tensors, tmp_path / "a.safetensors")
    loaded = load_safetensors(tmp_path / "a.safetensors", return_metadata=False)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.safetensors"
    save_safetensors({"w": torch.ones(1)}, path)

    def write_half(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", write_half)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors({"w": torch.zeros(1)}, path)
    assert load_safetensors(path, return_metadata=False)["w"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_a_file_can_be_read_by_whoever_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        save_safetensors({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_a_module_is_built_loaded_and_put_into_eval(tmp_path):
    weights = {"proj.weight": torch.randn(3, 2), "proj.bias": torch.randn(3)}
    save_safetensors(weights, tmp_path / "a.safetensors", LINEAR)
    state = torch.get_rng_state()
    model = load_model_from_safetensors(tmp_path / "a.safetensors", device="cpu")
    assert torch.equal(torch.get_rng_state(), state), "loading leaves the generator alone"
    assert not model.training
    assert load_model_from_safetensors(tmp_path / "a.safetensors", to_eval=False).training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"proj.weight": torch.ones(3, 2)}, "Missing.*proj.bias"),
        ({"proj.weight": torch.ones(3, 2), "proj.bias": torch.ones(3), "extra": torch.ones(1)}, "Unexpected.*extra"),
        ({"proj.weight": torch.ones(3, 4), "proj.bias": torch.ones(3)}, r"size mismatch for proj.weight.*\[3, 4\]"),
    ],
)
def test_weights_that_do_not_fit_are_listed(tmp_path, weights, complaint):
    save_safetensors(weights, tmp_path / "a.safetensors", LINEAR)
    with pytest.raises(ValueError, match=rf"(?s)a\.safetensors.*{complaint}"):
        load_model_from_safetensors(tmp_path / "a.safetensors")


def test_an_argument_that_a_class_does_not_have_is_named(tmp_path):
    save_safetensors({"w": torch.ones(1)}, tmp_path / "a.safetensors", LINEAR | {"widht": 3})
    with pytest.raises(ValueError, match=r"(?s)a\.safetensors.*widht"):
        load_model_from_safetensors(tmp_path / "a.safetensors")


def test_the_published_checkpoint_loads(recorded_folder):
    model = load_model_from_safetensors("tiny_flextok/model.safetensors")
    tensors = load_safetensors("tiny_flextok/model.safetensors", return_metadata=False)
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_levels_must_fit_the_layers_around_the_quantizer(tiny_config, recorded_folder):
    tiny_config["regularizer"]["levels"] = [8, 5, 5]
    with pytest.raises(ValueError, match=r"encoder\.module_dict\.enc_to_latents\.dim_out: 6 .*valid is 3"):
        instantiate_parts(tiny_config)
    tiny_config["encoder"]["module_dict"]["enc_to_latents"]["dim_out"] = 3
    with pytest.raises(ValueError, match=r"decoder\.module_dict\.dec_from_latents\.dim_in: 6 .*valid is 3"):
        instantiate_parts(tiny_config)


def test_swapped_levels_without_their_weights_show_both_shapes(tmp_path, tiny_config, recorded_folder):
    tensors = load_safetensors("tiny_flextok/model.safetensors", return_metadata=False)
    tiny_config["regularizer"]["levels"] = [8, 5, 5]
    tiny_config["encoder"]["module_dict"]["enc_to_latents"]["dim_out"] = 3
    tiny_config["decoder"]["module_dict"]["dec_from_latents"]["dim_in"] = 3
    save_safetensors(tensors, tmp_path / "a.safetensors", tiny_config)
    with pytest.raises(ValueError, match=r"(?s)size mismatch.*enc_to_latents.*dec_from_latents"):
        load_model_from_safetensors(tmp_path / "a.safetensors")


def test_every_allowed_target_exists():
    for target in sorted(ALLOWED_TARGETS):
        module, _, name = target.rpartition(".")
        assert callable(getattr(__import__(module, fromlist=[name]), name)), target


def test_sanitising_copies_deeply_and_changes_nothing(tiny_config):
    clean = sanitize_hydra_config(tiny_config)
    assert clean == tiny_config
    clean["decoder"]["module_dict"]["dec_seq_packer"]["input_list_read_keys"].append("x")
    assert clean != tiny_config
    from_omegaconf = sanitize_hydra_config(OmegaConf.create(tiny_config))
    assert from_omegaconf == tiny_config
    assert type(from_omegaconf["regularizer"]["levels"]) is list


def test_official_configs_have_no_field_of_ours_and_always_pad(tiny_config):
    packer = tiny_config["decoder"]["module_dict"]["dec_seq_packer"]
    ours = json.loads(json.dumps(tiny_config))
    mine = ours["decoder"]["module_dict"]["dec_seq_packer"]
    mine["_target_"] = "flextok.model.preprocessors.nested_dropout_seq_packer.NestedDropoutSequencePacker"
    mine["drop_masked"] = True
    del mine["pad_to_multiple"]
    ours["regularizer"]["levels"] = tuple(ours["regularizer"]["levels"])
    before = repr(ours)
    official = official_config(OmegaConf.create({"n": 4, "model": ours}).model)
    assert official == official_config(ours)
    assert repr(ours) == before
    exported = official["decoder"]["module_dict"]["dec_seq_packer"]
    assert exported == {**packer, "_target_": mine["_target_"], "pad_to_multiple": 128}
    assert official["regularizer"]["levels"] == [8, 8, 8, 5, 5, 5]
    mine["max_seq_len"] = 256
    assert "pad_to_multiple" not in official_config(ours)["decoder"]["module_dict"]["dec_seq_packer"]


def test_a_file_without_our_config_can_still_be_read(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "a: [b"})
    tensors, config = load_safetensors(tmp_path / "a.safetensors")
    assert config == {"format": "pt", "note": "a: [b"}
    assert tensors["w"] == 1
