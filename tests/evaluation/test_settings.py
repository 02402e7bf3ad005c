"""Wrong options are found before a model is loaded, with the field, its value and what is valid."""

import inspect
import re

import pytest

from flextok.evaluation.grid import Curve, decode_options
from flextok.evaluation.settings import EvaluationSettings, resolve_keep_ks
from flextok.evaluation.targets import Target
from flextok.flextok_wrapper import FlexTok
from tests.evaluation.stub import SETTINGS


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("steps", 0, "at least 1"),
        ("steps", 2.5, "whole number"),
        ("num_images", 0, "at least 1"),
        ("num_images", True, "whole number"),
        ("batch_size", 0, "at least 1"),
        ("grid_images", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("weights", "best", "ema, raw"),
        ("split", "train", "test, val"),
        ("guidance_scale", "high", "number"),
        ("steps", [], "one value or several"),
        ("perform_norm_guidance", 1, "true and false"),
        ("forms", "mask_token", "attention_mask, packed"),
        ("forms", [], "one value or several"),
        ("backends", "cudnn", "auto, flex"),
        ("resume", "yes", "true and false"),
        ("sampler", "ddim", "euler, heun"),
        ("sampler", None, "euler, heun"),
        ("timestep_shift", 0, "positive number"),
        ("timestep_shift", "high", "positive number"),
        ("guidance_interval", [0.8, 0.2], "low <= high"),
        ("guidance_interval", [0.5], "two times"),
        ("guidance_interval", 0.5, "two times"),
        ("guidance_interval", None, "two times"),
        ("guidance_every", 0, "at least 1"),
        ("guidance_every", 1.5, "whole number"),
        ("kid_subsets", 0, "at least 1"),
        ("kid_subset_size", 1, "at least 2"),
        ("reference_cache", None, "a folder"),
        ("import_references", 3, "a folder"),
        ("export_references", True, "a folder"),
        ("features", ["inception"], "networks by name"),
        ("distances", "lpips", "networks by name"),
        ("targets", [], "targets such as psnr=24"),
    ],
)
def test_the_message_names_field_value_and_valid_values(field, value, valid):
    with pytest.raises(ValueError, match=f"evaluation.{field}={re.escape(repr(value))}.*{valid}"):
        EvaluationSettings.from_mapping({**SETTINGS, field: value})


def test_targets_are_of_metrics_and_of_networks_that_are_named():
    assert EvaluationSettings.from_mapping({**SETTINGS, "targets": "psnr=24"}).targets == (Target("psnr", 24.0),)
    networks = {"distances": {"a": {"_target_": "x.Y"}}, "features": {"b": {"_target_": "x.Y"}}}
    settings = EvaluationSettings.from_mapping({**SETTINGS, **networks, "targets": ["b=1", "a=0.5", "b=1.0"]})
    assert settings.targets == (Target("b", 1.0), Target("a", 0.5))
    for text, valid in (
        ("lpips=0.2", "psnr=NUMBER, ssim=NUMBER, a=NUMBER, b=NUMBER"),
        ("psnr=x", "NUMBER"),
        (3, "'3'"),
    ):
        with pytest.raises(ValueError, match=rf"evaluation\.targets: .*{valid}.*as with evaluation/distances=lpips"):
            EvaluationSettings.from_mapping({**SETTINGS, **networks, "targets": [text]})
    networks["features"]["a"] = {"_target_": "x.Y"}
    with pytest.raises(ValueError, match=r"evaluation\.targets=\['a=1'\]: 'a' names two networks"):
        EvaluationSettings.from_mapping({**SETTINGS, **networks, "targets": ["a=1"]})


@pytest.mark.parametrize("name", ["psnr", "keep_k", "a-b", "", "1st"])
def test_networks_have_names_that_can_be_columns(name):
    with pytest.raises(ValueError, match=rf"evaluation\.distances: {name!r} is no name for a network"):
        EvaluationSettings.from_mapping({**SETTINGS, "distances": {name: {"_target_": "a.B"}}})


@pytest.mark.parametrize("network", [None, "a.B", {"path": "x"}])
def test_a_network_is_a_config_with_a_target(network):
    with pytest.raises(ValueError, match=r"evaluation\.features\.mine=.*valid is a config with a _target_"):
        EvaluationSettings.from_mapping({**SETTINGS, "features": {"mine": network}})


def test_unknown_and_missing_options_are_named():
    with pytest.raises(ValueError, match=r"evaluation\.step: unknown"):
        EvaluationSettings.from_mapping({**SETTINGS, "step": 3})
    with pytest.raises(ValueError, match=r"evaluation\.steps: missing"):
        EvaluationSettings.from_mapping({k: v for k, v in SETTINGS.items() if k != "steps"})


def test_one_number_is_a_list_of_one():
    assert EvaluationSettings.from_mapping({**SETTINGS, "keep_ks": 4}).keep_ks == (4,)
    assert EvaluationSettings.from_mapping({**SETTINGS, "keep_ks": [4, 2]}).keep_ks == (4, 2)


@pytest.mark.parametrize(
    ("field", "values", "wrong"),
    [("steps", [4, 0], 0), ("guidance_scale", [1.0, True], True), ("forms", ["packed", 1], 1)],
)
def test_of_several_values_the_wrong_one_is_named(field, values, wrong):
    with pytest.raises(ValueError, match=f"evaluation.{field}={wrong!r}: valid"):
        EvaluationSettings.from_mapping({**SETTINGS, field: values})


def test_axes_take_one_value_or_several():
    one = EvaluationSettings.from_mapping({**SETTINGS, "steps": 4, "guidance_scale": 2, "forms": "packed"})
    assert (one.steps, one.guidance_scale, one.forms, one.backends) == ((4,), (2.0,), ("packed",), None)
    several = EvaluationSettings.from_mapping({**SETTINGS, "steps": [4, 2, 4], "guidance_scale": [3, 1]})
    assert (several.steps, several.guidance_scale) == ((2, 4), (1.0, 3.0))


def test_whole_numbers_and_lists_of_a_command_line_become_the_types_of_decode():
    given = {**SETTINGS, "timestep_shift": 3, "guidance_scale": 2, "guidance_interval": [0, 1]}
    settings = EvaluationSettings.from_mapping(given)
    options = decode_options(settings, Curve(settings.steps[0], settings.guidance_scale[0]))
    assert options == {
        "timesteps": 2,
        "sampler": "euler",
        "timestep_shift": 3.0,
        "guidance_scale": 2.0,
        "perform_norm_guidance": False,
        "guidance_interval": (0.0, 1.0),
        "guidance_every": 1,
    }
    assert isinstance(options["timestep_shift"], float)
    assert all(isinstance(t, float) for t in options["guidance_interval"])


def test_every_option_of_sampling_is_one_of_decode():
    options = decode_options(EvaluationSettings.from_mapping(SETTINGS), Curve(2, 1.0))
    assert set(options) <= set(inspect.signature(FlexTok.decode).parameters)


@pytest.mark.parametrize(
    ("num_registers", "keep_ks"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])],
)
def test_the_default_is_powers_of_two_and_all(num_registers, keep_ks):
    assert resolve_keep_ks(None, num_registers) == keep_ks


def test_given_keep_ks_are_sorted_and_deduplicated():
    assert resolve_keep_ks((4, 1, 4), 4) == [1, 4]


@pytest.mark.parametrize("keep_ks", [(0,), (5,), (-1,), (1.5,), (True,), ("2",), ([1],), ()])
def test_keep_ks_outside_the_registers_are_refused(keep_ks):
    with pytest.raises(ValueError, match=r"evaluation\.keep_ks=.*1 to 4"):
        resolve_keep_ks(keep_ks, 4)
