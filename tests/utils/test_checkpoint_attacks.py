"""Files and configs made to harm: each is refused with a message, and nothing is imported, built or run."""

import importlib
import json
import struct
import sys
from contextlib import suppress

import hydra.utils
import numpy.ctypeslib  # noqa: F401 (safetensors imports it on writing, which is no attack)
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from flextok import FlexTokFromHub
from flextok.utils import instantiate
from flextok.utils.checkpoint import load_metadata, load_model_from_safetensors, load_safetensors
from flextok.utils.config_safety import ALLOWED_TARGETS, MAX_NODES, sanitize_hydra_config
from flextok.utils.config_text import MAX_DEPTH
from tests.support import LINEAR, RECORDED

TINY = RECORDED / "tiny_flextok"
FSQ = "flextok.regularizers.quantize_fsq.FSQ"
OP = "flextok.model.utils.dict_ops.PerSampleOp"
SEQUENTIAL = "flextok.model.utils.wrappers.SequentialModuleDictWrapper"


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A file that the attacks try to create; building and importing are made to fail loudly."""

    def must_not_run(*args, **kwargs):
        raise AssertionError(f"reached with {args} {kwargs}")

    monkeypatch.setattr(hydra.utils, "instantiate", must_not_run)
    monkeypatch.setattr(instantiate.hydra.utils, "instantiate", must_not_run)
    monkeypatch.setattr(importlib, "import_module", must_not_run)
    modules = set(sys.modules)
    path = tmp_path / "pwned"
    yield path
    assert not path.exists(), "the attack ran"
    assert set(sys.modules) <= modules, "something was imported"


def run(path):
    return {"_target_": "os.system", "_args_": [f"touch {path}"]}


def at(value):
    """A FlexTok-like config with `value` for one module of its decoder."""
    return {
        "_target_": "flextok.flextok_wrapper.FlexTok",
        "decoder": {"_target_": SEQUENTIAL, "module_dict": {"x": value}},
    }


X = r"decoder\.module_dict\.x"

# What is attacked, and the part of the message that names the place.
TARGETS = {
    "top level": (lambda p: run(p), "_target_: 'os.system'"),
    "module": (lambda p: at(run(p)), X + r"\._target_"),
    "argument": (lambda p: at({"_target_": OP, "per_sample_op": run(p)}), X + r"\.per_sample_op\._target_"),
    "list": (lambda p: at([1, [run(p)]]), X + r"\[1\]\[0\]\._target_"),
    "tuple": (lambda p: at(("a", (run(p),))), X + r"\[1\]\[0\]\._target_"),
    "args": (lambda p: at({"_target_": OP, "_args_": [run(p)]}), X + r"\._args_\[0\]\._target_"),
    "args tuple": (lambda p: at({"_target_": OP, "_args_": (run(p),)}), X + r"\._args_\[0\]\._target_"),
    "partial": (lambda p: at({**run(p), "_partial_": True}), X + r"\._target_"),
    "args of a partial": (
        lambda p: at({"_target_": OP, "_partial_": True, "_args_": [[run(p)]]}),
        X + r"\._args_\[0\]\[0\]\._target_",
    ),
    "not recursive": (lambda p: at({"_target_": OP, "_recursive_": False, "a": run(p)}), X + r"\.a\._target_"),
    "beside an allowed one": (lambda p: {"a": {"_target_": FSQ}, "b": run(p)}, r"b\._target_"),
    "levels": (lambda p: at({"_target_": FSQ, "levels": [8, run(p)]}), X + r"\.levels\[1\]\._target_"),
}
NAMES = [
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.Popen",
    "subprocess.check_output",
    "importlib.import_module",
    "hydra.utils.get_method",
    "hydra.utils.get_class",
    "hydra.utils.instantiate",
    "hydra._internal.utils._locate",
    "functools.partial",
    "torch.load",
    "torch.hub.load",
    "torch.nn.SiLU",
    "pickle.loads",
    "flextok",
    "flextok.flextok_wrapper",
    "flextok.flextok_wrapper.FlexTok.__init__.__globals__",
    "flextok.flextok_wrapper.FlexTok.__init__",
    "flextok.flextok_wrapper.hydra.utils.instantiate",
    "flextok.flextok_wrapper.FlexTokFromHub.from_pretrained",
    "flextok.model.utils.wrappers.torch.hub.load",
    "flextok.model.utils.wrappers.torch.load",
    "flextok.utils.checkpoint.os.system",
    "flextok.utils.checkpoint.load_model_from_safetensors",
    "flextok.regularizers.quantize_fsq.FSQ.__class__",
    "flextok.regularizers.quantize_fsq.FSQ ",
    " flextok.regularizers.quantize_fsq.FSQ",
    "flextok.regularizers.quantize_fsq.FSQ\n",
    "flextok..regularizers.quantize_fsq.FSQ",
    "flextok.regularizers.quantize_fsq.fsq",
    "flextok.regularizers.quantize_fsq.\uff26SQ",
    "FSQ",
    "",
]
BAD_TARGETS = [None, 1, True, ["os.system"], ("os", "system"), {"a": "b"}, [FSQ]]
OTHER = {
    "environment": ({"a": [{"b": "${oc.env:HOME}"}]}, r"a\[0\]\.b"),
    "interpolation in the middle": ({"a": "x ${b} y"}, "a: .*interpolations"),
    "escaped interpolation": ({"a": "\\${b}"}, "a: .*interpolations"),
    "open interpolation": ({"a": "${"}, "a: .*interpolations"),
    "interpolated key": ({"a": {"${b}": 1}}, "interpolations"),
    "interpolated target": (at({"_target_": "${oc.env:TARGET}"}), X + r"\._target_.*interpolations"),
    "missing value": ({"a": "???"}, "a: .*missing"),
    "number as key": ({"a": {1: "b"}}, "a: 1 is refused: keys are strings"),
    "none as key": ({"a": {None: "b"}}, "keys are strings"),
    "partial that is no bool": (at({"_target_": FSQ, "_partial_": "yes"}), X + r"\._partial_: 'yes'"),
    "partial as number": (at({"_target_": FSQ, "_partial_": 1}), X + r"\._partial_: 1"),
    "recursive that is no bool": (at({"_target_": FSQ, "_recursive_": None}), X + r"\._recursive_"),
    "unknown conversion": (at({"_target_": FSQ, "_convert_": "pickle"}), X + r"\._convert_: 'pickle'.*none, partial"),
    "arguments as string": (at({"_target_": FSQ, "_args_": "ab"}), X + r"\._args_: 'ab'.*list"),
    "arguments as dict": (at({"_target_": FSQ, "_args_": {"0": 1}}), X + r"\._args_"),
    "special key of another tool": (at({"_target_": FSQ, "_call_": True}), X + r"\._call_.*valid special keys"),
    "dunder": (at({"__class__": "x"}), X + r"\.__class__"),
    "hub path as list": ({"vae": {"hf_hub_path": ["a"]}}, r"vae\.hf_hub_path.*string or None"),
    "bytes": ({"a": b"x"}, "a: b'x'"),
    "callable": ({"a": print}, "a: "),
    "class as target": (at({"_target_": torch.nn.Linear}), X + r"\._target_"),
    "set": ({"a": {1, 2}}, "a: "),
    "integer of 65 bits": ({"a": [2**63]}, r"a\[0\]: 9223372036854775808 is refused: an integer has at most 64 bits"),
    "integer without text": ({"a": 10**5000}, "a: a very long int is refused"),
    "integer without text as key": ({10**5000: 1}, "a very long int is refused: keys are strings"),
}


@pytest.mark.parametrize("attack", TARGETS)
def test_forbidden_targets_are_found_wherever_they_hide(attack, sentinel):
    make, place = TARGETS[attack]
    for cfg in (make(sentinel), OmegaConf.create(make(sentinel))):
        with pytest.raises(ValueError, match=f"config, {place}"):
            sanitize_hydra_config(cfg)
    with pytest.raises(ValueError, match=place):
        instantiate.instantiate_parts(make(sentinel))


@pytest.mark.parametrize("attack", TARGETS)
def test_files_with_forbidden_targets_are_not_built(attack, sentinel, tmp_path):
    make, place = TARGETS[attack]
    metadata = {key: str(value) for key, value in make(sentinel).items()}
    save_file({"w": torch.ones(1)}, tmp_path / "evil.safetensors", metadata=metadata)
    for load in (load_model_from_safetensors, load_safetensors, load_metadata):
        with pytest.raises(ValueError, match=rf"evil\.safetensors: config, .*{place}"):
            load(tmp_path / "evil.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_compared_whole(name, sentinel):
    with pytest.raises(ValueError, match=X + r"\._target_: .*ALLOWED_TARGETS"):
        sanitize_hydra_config(at({"_target_": name}))


@pytest.mark.parametrize("target", BAD_TARGETS, ids=repr)
def test_targets_are_strings(target, sentinel):
    with pytest.raises(ValueError, match=X + r"\._target_"):
        sanitize_hydra_config(at({"_target_": target}))


@pytest.mark.parametrize("attack", OTHER)
def test_other_tricks(attack, sentinel):
    cfg, place = OTHER[attack]
    with pytest.raises(ValueError, match=place):
        sanitize_hydra_config(cfg)


@pytest.mark.parametrize(
    "cfg", [None, 3, "os.system", ["a"], (1,), OmegaConf.create(["a"]), pytest.param(object(), id="object")], ids=repr
)
def test_a_config_is_a_dict(cfg, sentinel):
    with pytest.raises(ValueError, match="config, top level"):
        sanitize_hydra_config(cfg)


def test_long_values_are_shortened_in_messages(sentinel):
    with pytest.raises(ValueError, match=X) as refusal:
        sanitize_hydra_config(at({"_target_": "flextok." * 10_000}))
    assert len(str(refusal.value)) < 1000
    with pytest.raises(ValueError, match="interpolations") as refusal:
        sanitize_hydra_config({"\n${" * 10_000: 1})
    assert len(str(refusal.value)) < 1000
    assert "\n" not in str(refusal.value)


def test_cycles_depth_and_size(sentinel):
    cyclic: dict = {"a": {}}
    cyclic["a"]["b"] = [cyclic]
    with pytest.raises(ValueError, match=r"a\.b\[0\].*itself"):
        sanitize_hydra_config(cyclic)
    deep: dict = {}
    for _ in range(MAX_DEPTH - 1):
        deep = {"a": deep}
    assert sanitize_hydra_config(deep) == deep
    with pytest.raises(ValueError, match="levels deep"):
        sanitize_hydra_config({"a": deep})
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="levels deep"):
        sanitize_hydra_config(deep)
    with pytest.raises(ValueError, match="values"):
        sanitize_hydra_config({"a": [0] * MAX_NODES})
    doubling: list = [0]
    for _ in range(MAX_DEPTH - 3):
        doubling = [doubling, doubling]
    with pytest.raises(ValueError, match="values"):
        sanitize_hydra_config({"a": doubling})


@pytest.mark.parametrize("part", ["vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline"])
@pytest.mark.parametrize("value", [None, 3, "os.system", [1], {}, {"_partial_": True}], ids=repr)
def test_every_part_must_be_a_dict_with_a_target(part, value, sentinel):
    names = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
    config = {name: {"_target_": FSQ} for name in names} | {part: value}
    with pytest.raises(ValueError, match=f"config, {part}: "):
        instantiate.instantiate_parts(config)
    del config[part]
    with pytest.raises(ValueError, match=f"config, {part}: "):
        instantiate.instantiate_parts(config)


def changed(config, place, value):
    """A copy with one entry replaced, or removed if `value` is REMOVED."""
    copy = json.loads(json.dumps(config))
    *path, last = place.split("/")
    node = copy
    for key in path:
        node = node[key]
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
    return copy


REMOVED = object()
MISFITS = {
    "vae of another kind": ("vae", LINEAR, "config, vae._target_: .*LinearLayer is refused.*PixelVAE"),
    "encoder of another kind": ("encoder", LINEAR, "config, encoder._target_: "),
    "pipeline of another kind": ("pipeline/_target_", FSQ, "config, pipeline._target_: .*MinRFPipeline"),
    "pipeline with arguments": ("pipeline/_args_", ["x"], "config, pipeline: "),
    "pipeline with unknown ones": ("pipeline/speed", "x", "config, pipeline: .*speed"),
    "pipeline at once": ("pipeline/_partial_", False, "config, pipeline: "),
    "partial vae": ("vae/_partial_", True, "config, vae: "),
    "no registers": (
        "encoder/module_dict/enc_register_module",
        REMOVED,
        r"config, encoder.*enc_register_module.*n_max",
    ),
    "other registers": ("encoder/module_dict/enc_register_module", LINEAR, r"config, encoder.*enc_register_module"),
    "no dropout": ("decoder/module_dict/dec_nested_dropout", REMOVED, r"config, decoder.*dec_nested_dropout"),
    "a number as module": ("decoder/module_dict/dec_nested_dropout", 3, "config, decoder: "),
    "modules as list": ("decoder/module_dict", [LINEAR], "config, decoder: "),
    "no modules": ("encoder/module_dict", REMOVED, "config, encoder: "),
    "levels as text": ("regularizer/levels", "many", "config, regularizer: "),
}
# In the files of a few kB: each would take more memory than any machine has.
TOO_LARGE = {
    "depth": ("encoder/module_dict/enc_transformer/depth", 100_000, r"enc_transformer\.depth: 100000 .*tensors"),
    "depths together": (
        "decoder/module_dict/dec_transformer/depth",
        243,
        r"transformer\.depth: (243|2) is refused.*tensors",
    ),
    "registers": ("encoder/module_dict/enc_register_module/n_max", 10_000_000, r"n_max: 10000000 is refused"),
    "smallest size": ("encoder/module_dict/enc_register_module/n_min", -10_000_000, r"n_min: -10000000 is refused"),
    "width": ("encoder/module_dict/enc_transformer/dim", 10**10, r"dim: 10000000000 is refused"),
    "width in range": ("encoder/module_dict/enc_transformer/dim", 9_999_968, r"size mismatch for encoder.*9999968"),
    "ratio": ("encoder/module_dict/enc_transformer/mlp_ratio", 1e9, r"size mismatch for encoder"),
    "positional": ("regularizer/_args_", ["a", "b", "c", [8]], r"regularizer\._args_\[3\]\[0\]: .*by name"),
}


@pytest.fixture(scope="module")
def released():
    """Config and weights of a small published model."""
    return json.loads((TINY / "config.json").read_text()), load_file(TINY / "model.safetensors")


def write_both(folder, config, weights):
    metadata = {key: str(value) for key, value in config.items()}
    save_file(weights, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("misfit", [*MISFITS, *TOO_LARGE])
def test_allowed_parts_in_wrong_places_and_sizes_are_named(misfit, released, tmp_path, recorded_folder):
    place, value, complaint = (MISFITS | TOO_LARGE)[misfit]
    config, weights = released
    write_both(tmp_path, changed(config, place, value), weights)
    with pytest.raises(ValueError, match=rf"(?s)model\.safetensors: .*{complaint}"):
        load_model_from_safetensors(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)model\.safetensors: .*{complaint}"):
        FlexTokFromHub.from_pretrained(tmp_path)
    if misfit in MISFITS:
        with pytest.raises(ValueError, match=complaint):
            instantiate.instantiate_parts(changed(config, place, value))


def test_a_module_alone_is_bounded_by_its_file_too(tmp_path):
    weights = {"proj.weight": torch.ones(3, 2), "proj.bias": torch.ones(3)}
    metadata = {key: str(value) for key, value in (LINEAR | {"dim": 9_000_000, "dim_in": 9_000_000}).items()}
    save_file(weights, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"size mismatch for proj.weight.*9000000, 9000000"):
        load_model_from_safetensors(tmp_path / "a.safetensors")


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_entry(shape, offsets, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED = {
    "empty": b"",
    "seven bytes": b"\x08" + b"\x00" * 6,
    "header length only": struct.pack("<Q", 16),
    "truncated header": safetensors_bytes({"a": 1})[:-3],
    "truncated data": safetensors_bytes(tensor_entry([2], [0, 8]), b"\x00" * 4),
    "header of 2^63 bytes": safetensors_bytes({}, length=2**63),
    "header of 2^64 - 1 bytes": safetensors_bytes({}, length=2**64 - 1),
    "header over the maximum": safetensors_bytes({}, length=100_000_001),
    "header longer than the file": safetensors_bytes({}, length=10_000),
    "not json": safetensors_bytes(b"{garbage"),
    "no dict": safetensors_bytes(b"[1, 2]"),
    "not utf-8": safetensors_bytes(b'{"\xff": 1}'),
    "deep json": safetensors_bytes(b"[" * 100_000),
    "tensor out of bounds": safetensors_bytes(tensor_entry([2], [0, 8])),
    "negative offsets": safetensors_bytes(tensor_entry([2], [-8, 0]), b"\x00" * 8),
    "offsets reversed": safetensors_bytes(tensor_entry([2], [8, 0]), b"\x00" * 8),
    "shape larger than data": safetensors_bytes(tensor_entry([1000], [0, 8]), b"\x00" * 8),
    "shape overflows": safetensors_bytes(tensor_entry([2**40, 2**40], [0, 8]), b"\x00" * 8),
    "unknown dtype": safetensors_bytes(tensor_entry([2], [0, 8], "Q99"), b"\x00" * 8),
    "metadata of numbers": safetensors_bytes({"__metadata__": {"a": 1}}),
    "metadata as list": safetensors_bytes({"__metadata__": ["a"]}),
    "unused bytes": safetensors_bytes(tensor_entry([2], [0, 8]), b"\x00" * 16),
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "zip": b"PK\x03\x04" + b"\x00" * 100,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_value_errors_that_name_the_file(damage, sentinel, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(DAMAGED[damage])
    for load in (load_safetensors, load_model_from_safetensors, load_metadata):
        with pytest.raises(ValueError, match=r"damaged\.safetensors: "):
            load(path)


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "nothing.safetensors")


METADATA_BOMBS = {
    "deep": "[" * 100_000,
    "long": "x" * 1_000_001,
    "aliases": "{a: &a [x, x], b: &b [*a, *a], c: [*b, *b]}",
    "yaml tag": "!!python/object/apply:os.system ['touch pwned']",
    "unclosed": "{'a': [1, 2",
    "digits": "1" * 5000,
    "bytes": "!!binary aGVsbG8=",
    "a set": "{1, 2}",
    "number as key": "{1: 2}",
}


@pytest.mark.parametrize("bomb", METADATA_BOMBS)
def test_bombs_in_the_metadata_name_their_key(bomb, sentinel, tmp_path):
    path = tmp_path / "bomb.safetensors"
    save_file({"w": torch.ones(1)}, path, metadata={"decoder": METADATA_BOMBS[bomb]})
    with pytest.raises(ValueError, match=r"bomb\.safetensors.*decoder"):
        load_model_from_safetensors(path)


def test_much_metadata_is_refused_as_a_whole(sentinel, tmp_path):
    path = tmp_path / "bomb.safetensors"
    save_file({"w": torch.ones(1)}, path, metadata={f"k{i}": "'" + "x" * 900_000 + "'" for i in range(5)})
    with pytest.raises(ValueError, match="characters of metadata"):
        load_metadata(path)


@given(st.binary(max_size=60), st.integers(0, 200))
def test_overwritten_bytes_never_raise_anything_else(tmp_path_factory, noise, start):
    path = tmp_path_factory.mktemp("noise") / "noise.safetensors"
    save_file({"w": torch.ones(3), "v": torch.ones(2)}, path, metadata={"a": "{'b': [1, 2]}", "c": "1e-05"})
    original = path.read_bytes()
    path.write_bytes(original[:start] + noise + original[start + len(noise) :])
    # Still readable by luck, or refused with a message.
    with suppress(ValueError):
        load_safetensors(path)


PLAIN_KEYS = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=5)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | PLAIN_KEYS


def nodes(leaves):
    allowed = st.sampled_from(sorted(ALLOWED_TARGETS)).map(lambda target: {"_target_": target})
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(PLAIN_KEYS, inner, max_size=3)
            | st.builds(lambda a, b: {**a, **b}, st.dictionaries(PLAIN_KEYS, inner, max_size=2), allowed)
            | st.builds(lambda args: {"_target_": OP, "_partial_": True, "_args_": args}, st.lists(inner, max_size=2))
        ),
        max_leaves=10,
    )


@given(st.dictionaries(PLAIN_KEYS, nodes(PLAIN), max_size=3))
def test_allowed_configs_pass_unchanged(cfg):
    assert repr(sanitize_hydra_config(cfg)) == repr(cfg)


@st.composite
def buried(draw):
    """A forbidden target under a random path of containers, each with harmless neighbours."""
    node = {"_target_": draw(st.sampled_from(NAMES)), **draw(st.dictionaries(PLAIN_KEYS, PLAIN, max_size=2))}
    for _ in range(draw(st.integers(0, 6))):
        neighbours = draw(st.lists(nodes(PLAIN), max_size=2))
        position = draw(st.integers(0, len(neighbours)))
        row = [*neighbours[:position], node, *neighbours[position:]]
        form = draw(st.sampled_from(["list", "tuple", "dict", "target", "args"]))
        node = {
            "list": row,
            "tuple": tuple(row),
            "dict": {f"k{i}": child for i, child in enumerate(row)},
            "target": {"_target_": FSQ, "levels": node},
            "args": {"_target_": OP, "_partial_": True, "_args_": row},
        }[form]
    return {"part": node}


@given(buried())
def test_a_forbidden_target_anywhere_is_refused(cfg):
    with pytest.raises(ValueError, match=r"config, part.*_target_"):
        sanitize_hydra_config(cfg)
