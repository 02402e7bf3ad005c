"""What does not change from step to step is computed once, and only if that is certain to be the same."""

import pytest
import torch
from torch import nn

from flextok.flow_matching.repeated_model import RepeatedModel
from flextok.model.utils.dict_ops import DictKeyFilter
from flextok.model.utils.wrappers import SequentialModuleDictWrapper
from tests.support import FORMS, max_difference, small_tokenizer

VARYING = ("x", "t")


class Sum(nn.Module):
    """Writes the sum of what it reads, plus a constant; notes how often it ran."""

    def __init__(self, reads, writes, plus=0.0):
        super().__init__()
        self.read_keys, self.write_key, self.plus = reads.split(), writes, plus
        self.runs = 0

    def forward(self, data):
        self.runs += 1
        data[self.write_key] = sum(data[key] for key in self.read_keys) + self.plus
        return data


class Secretive(nn.Module):
    """Names none of its keys."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, data):
        self.runs += 1
        data["x"] = data["x"] * 2
        return data


class InPlaceKey(nn.Module):
    """Reads and writes one key."""

    def __init__(self, key, plus=1.0):
        super().__init__()
        self.read_write_key, self.plus = key, plus

    def forward(self, data):
        data[self.read_write_key] = data[self.read_write_key] + self.plus
        return data


def pipeline(**modules):
    return SequentialModuleDictWrapper(modules).eval()


CASES = {
    "two chains": (
        {"a": Sum("c", "a"), "b": Sum("x a", "b"), "d": Sum("c", "d"), "y": Sum("b d", "y")},
        (["a", "d"], ["b", "y"]),
    ),
    "nobody wants it": (
        {"a": Sum("c", "a"), "unread": Sum("a x", "unread"), "y": Sum("a x", "y"), "late": Sum("y", "late")},
        (["a"], ["y"]),
    ),
    "written over before it is read": (
        {"first": Sum("c", "a"), "second": Sum("c c", "a"), "y": Sum("a x", "y")},
        (["second"], ["y"]),
    ),
    "everything varies": ({"a": Sum("x", "a"), "y": Sum("a t", "y")}, ([], ["a", "y"])),
    "nothing varies": ({"a": Sum("c", "a"), "y": Sum("a c", "y")}, (["a", "y"], [])),
    # `late` writes a key that `early` read before: ahead of it, it would change what `early` reads.
    "writes what was read before": (
        {"early": Sum("x c", "a"), "late": Sum("d", "c"), "y": Sum("a c", "y")},
        ([], ["early", "late", "y"]),
    ),
    "writes what was written before": (
        {"early": Sum("x", "a"), "b": Sum("a", "b"), "late": Sum("d", "a"), "y": Sum("a b", "y")},
        ([], ["early", "b", "late", "y"]),
    ),
    "changes a key in its place": (
        {"a": InPlaceKey("c"), "b": Sum("c x", "b"), "again": InPlaceKey("c"), "y": Sum("b c", "y")},
        (["a"], ["b", "again", "y"]),
    ),
    "writes a key that varies": (
        {"t": Sum("c", "t"), "y": Sum("t x", "y")},
        ([], ["t", "y"]),
    ),
    "changes a key that varies": ({"a": InPlaceKey("x"), "y": Sum("x c", "y")}, ([], ["a", "y"])),
    "names no keys": (
        {"a": Sum("c", "a"), "secret": Secretive(), "b": Sum("c", "b"), "y": Sum("a b x", "y")},
        (["a"], ["secret", "b", "y"]),
    ),
    "names no keys, at the end": (
        {"a": Sum("c", "a"), "unread": Sum("a", "unread"), "y": Sum("a x", "y"), "secret": Secretive()},
        (["a", "unread"], ["y", "secret"]),
    ),
    "a filter of keys": (
        {"a": Sum("c", "a"), "filter": DictKeyFilter(blocked_keys=["d"]), "y": Sum("a x", "y")},
        (["a"], ["filter", "y"]),
    ),
    "a pipeline in a pipeline": (
        {"a": Sum("c", "a"), "inner": SequentialModuleDictWrapper({"b": Sum("x", "b")}), "y": Sum("a b", "y")},
        (["a"], ["inner", "y"]),
    ),
}
every_case = pytest.mark.parametrize(("modules", "expected"), CASES.values(), ids=CASES)


@every_case
def test_which_modules_run_once(modules, expected):
    assert pipeline(**modules).split(VARYING, "y") == expected


def inputs():
    return {"c": torch.tensor(1.0), "d": torch.tensor(10.0), "x": torch.tensor(-1.0)}


@every_case
def test_calls_equal_those_of_the_whole_pipeline(modules, expected):
    model = pipeline(**modules)
    given = inputs()
    repeated = RepeatedModel(model, given, varying=VARYING, wanted="y")
    for i in range(3):
        values = {"x": torch.tensor(float(i)), "t": torch.tensor(100.0 * i)}
        assert torch.equal(repeated(values)["y"], model({**given, **values})["y"])
    assert given == inputs()


def test_once_is_once_and_unwanted_is_never():
    modules = {"a": Sum("c", "a"), "unread": Sum("a x", "unread"), "y": Sum("a x", "y")}
    repeated = RepeatedModel(pipeline(**modules), inputs(), varying=VARYING, wanted="y")
    for i in range(4):
        repeated({"x": torch.tensor(float(i)), "t": torch.tensor(0.0)})
    assert {name: module.runs for name, module in modules.items()} == {"a": 1, "unread": 0, "y": 4}


def test_in_training_every_call_runs_everything():
    """Modules draw then, each time anew."""
    modules = {"a": Sum("c", "a"), "unread": Sum("a x", "unread"), "y": Sum("a x", "y")}
    repeated = RepeatedModel(pipeline(**modules).train(), inputs(), varying=VARYING, wanted="y")
    for i in range(3):
        repeated({"x": torch.tensor(float(i)), "t": torch.tensor(0.0)})
    assert [module.runs for module in modules.values()] == [3, 3, 3]


def test_wrappers_around_the_call_stay_in_force():
    model = pipeline(a=Sum("c", "a"), y=Sum("a x", "y"))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
    repeated = RepeatedModel(model, inputs(), varying=VARYING, wanted="y")
    repeated({"x": torch.tensor(0.0), "t": torch.tensor(0.0)})
    assert seen == [2, 2]


# --- decoding ---------------------------------------------------------------------------------------------------------


class Plain:
    """The decoder behind a call that says nothing about its modules."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.device = torch.device("cpu")

    def __call__(self, data):
        return self.decoder(data)


SIZES = {"equal": ((8, 8),) * 3, "mixed": ((8, 8), (4, 8), (6, 2))}
OPTIONS = {
    "euler": {},
    "heun": {"sampler": "heun"},
    "guided": {"guidance_scale": 3.0},
    "guided_heun": {"guidance_scale": 3.0, "sampler": "heun"},
    "apg": {"guidance_scale": 3.0, "perform_norm_guidance": True},
    "interval": {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)},
    "reused": {"guidance_scale": 3.0, "guidance_every": 2},
    "schedule": {"guidance_scale": lambda t: 1.0 + round(t)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decoding_equals_that_of_the_decoder_called_as_a_whole(form, sizes, options, monkeypatch):
    model = small_tokenizer(form).eval()
    results = []
    for decoder in (model.decoder, Plain(model.decoder)):
        monkeypatch.setattr(model.pipeline, "model", decoder)
        generator = torch.Generator().manual_seed(0)
        data = {
            "enc_registers_quant": list(torch.randn(3, 16, 6, generator=generator).split(1)),
            "eval_keep_k": [4, 1, 16],
            "rng": generator,
        }
        options = {"timesteps": 3, "vae_image_sizes": list(sizes), "verbose": False} | options
        results.append(list(model.pipeline(data, **options)["vae_latents_reconst"]))
    for mine, theirs in zip(*results, strict=True):
        assert max_difference(mine, theirs) < 1e-6 * max(1.0, float(theirs.abs().max()))
