"""What a config from elsewhere may ask Hydra to build: the classes of this package, and nothing else.

`hydra.utils.instantiate` imports and calls whatever `_target_` names, and resolves `${...}`, environment
variables included. So a config from a file or from the hub is copied into plain containers here first, and
any part of it that is not known to be harmless is an error. The check neither imports nor looks up anything.
"""

import difflib
import reprlib
from collections.abc import Iterator
from typing import Any, NoReturn

from omegaconf import OmegaConf, SCMode

from flextok.utils.config_text import MAX_CHARS, MAX_DEPTH

MAX_NODES = 100_000

_CLASSES_BY_MODULE = {
    "flextok_wrapper": ("FlexTok", "FlexTokFromHub"),
    "vae_wrapper": ("StableDiffusionVAE",),
    "pixel_vae": ("PixelVAE",),
    "flow_matching.pipelines": ("MinRFPipeline",),
    "flow_matching.noise_modules": ("MinRFNoiseModule",),
    "flow_matching.cfg_utils": ("MomentumBuffer",),
    "model.utils.wrappers": ("SequentialModuleDictWrapper",),
    "model.utils.posembs": ("PositionalEmbedding", "PositionalEmbeddingAdder"),
    "model.utils.dict_ops": (
        "DictKeyFilter",
        "PerSampleOp",
        "PerSampleReducer",
        "channels_first_to_last",
        "channels_last_to_first",
        "concat_tensors",
        "multiply_tensors",
        "sum_tensors",
    ),
    "model.trunks.transformers": ("FlexTransformer", "FlexTransformerDecoder"),
    "model.preprocessors.dropout_sampler": ("DropoutSampler",),
    "model.preprocessors.token_dropout": ("MaskedNestedDropout",),
    "model.preprocessors.attention_masked_nested_dropout": ("AttentionMaskedNestedDropout",),
    "model.preprocessors.nested_dropout_seq_packer": ("NestedDropoutSequencePacker",),
    "model.preprocessors.time_embedding": ("TimestepEmbedder",),
    "model.preprocessors.registers": ("Registers1D",),
    "model.preprocessors.patching": ("PatchEmbedder",),
    "model.preprocessors.nullcond": ("ZeroNullCond", "LearnedNullCond"),
    "model.preprocessors.mask_tokens": ("MaskTokenModule",),
    "model.preprocessors.linear": ("LinearLayer",),
    "model.preprocessors.flex_seq_packing": ("BlockWiseSequencePacker",),
    "model.postprocessors.seq_unpacking": ("SequenceUnpacker",),
    "model.postprocessors.heads": ("LinearHead", "ToPatchesLinearHead", "MLPHead"),
    "model.layers.transformer_blocks": (
        "FlexBlock",
        "FlexBlockAdaLN",
        "FlexDecoderBlock",
        "FlexDecoderBlockAdaLN",
    ),
    "model.layers.norm": ("Fp32LayerNorm",),
    "model.layers.mup_readout": ("MuReadoutFSDP",),
    "model.layers.mlp": ("Mlp", "GatedMlp"),
    "model.layers.drop_path": ("DropPath",),
    "model.layers.attention": ("FlexAttention", "FlexSelfAttention", "FlexCrossAttention"),
    "regularizers.quantize_fsq": ("FSQ",),
}
ALLOWED_TARGETS = frozenset(
    f"flextok.{module}.{name}" for module, names in _CLASSES_BY_MODULE.items() for name in names
)

# What the config of a run may name as its data.
DATA_TARGETS = frozenset(
    (
        "flextok.data.digits.DigitsDataModule",
        "flextok.data.hf.HuggingFaceDataModule",
        "flextok.data.image_folder.ImageFolderDataModule",
        "flextok.data.photos.PhotosDataModule",
        "flextok.data.streaming.StreamingDataModule",
        "flextok.data.webdataset.WebDatasetDataModule",
    )
)

_CONVERT_MODES = ("none", "partial", "object", "all")


def sanitize_hydra_config(cfg: Any, *, allowed: frozenset[str] = ALLOWED_TARGETS) -> dict[str, Any]:
    """A plain, deep copy of a config that is safe to instantiate.

    `cfg` is a dict or a DictConfig (not resolved here). Dicts, lists, tuples, strings, numbers, booleans and
    None are allowed, and come back equal; `_target_` must be in `allowed`, at any depth.

    `hf_hub_path` stays as it is (a string or None), for released configs may use it. So building a foreign
    config can still make diffusers read a local folder or download one from the hub.

    Raises ValueError naming the place of the first offence (`decoder.module_dict.x._args_[0]._target_`), its
    value and what would be valid: unknown targets, interpolations (`${...}`) in keys or values, missing
    values (`???`), keys that are not strings, unknown special keys (`_x_`), other types, integers of more than
    64 bits, cycles, and configs that are too deep or too large.
    """
    clean = _Sanitizer(allowed).copy(cfg, path="", depth=0)
    if not isinstance(clean, dict):
        _refuse("", cfg, "a config is a dict")
    return clean


class _Sanitizer:
    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed
        self.num_nodes = 0
        self.open_containers: set[int] = set()

    def copy(self, value: Any, path: str, depth: int) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            _refuse(path, value, f"a config has at most {MAX_NODES:,} values")
        if OmegaConf.is_config(value):
            value = _to_plain(value, path)
        if isinstance(value, dict | list | tuple):
            return self._copy_container(value, path, depth)
        # Exact types: a subclass may answer differently each time it is asked.
        if type(value) is str:
            _check_text(value, path)
        elif value is not None and type(value) not in (bool, int, float):
            _refuse(path, value, "values are strings, numbers, booleans, None, dicts, lists and tuples")
        elif type(value) is int and not -(2**63) <= value < 2**63:
            _refuse(path, value, "an integer has at most 64 bits, the sign included")
        return value

    def _copy_container(self, value: Any, path: str, depth: int) -> Any:
        if id(value) in self.open_containers:
            _refuse(path, type(value), "a container must not contain itself")
        if depth >= MAX_DEPTH:
            _refuse(path, type(value), f"a config is at most {MAX_DEPTH} levels deep")
        self.open_containers.add(id(value))
        if isinstance(value, dict):
            clean: Any = {key: self.copy(child, place, depth + 1) for key, child, place in _checked_items(value, path)}
            _check_special_keys(clean, path, self.allowed)
        else:
            items = (self.copy(child, f"{path}[{i}]", depth + 1) for i, child in enumerate(value))
            clean = tuple(items) if isinstance(value, tuple) else list(items)
        self.open_containers.remove(id(value))
        return clean


def _to_plain(value: Any, path: str) -> Any:
    try:
        # Not resolved: an interpolation has to be seen and refused, not followed.
        return OmegaConf.to_container(value, resolve=False, structured_config_mode=SCMode.DICT)
    except RecursionError as error:
        raise ValueError(f"config, {path or 'top level'}: a config is at most {MAX_DEPTH} levels deep") from error


def _checked_items(mapping: dict[Any, Any], path: str) -> Iterator[tuple[str, Any, str]]:
    for key, child in mapping.items():
        if type(key) is not str:
            _refuse(path, key, "keys are strings")
        name = _shorten(key if key.isprintable() else repr(key))
        place = f"{path}.{name}" if path else name
        _check_text(key, place)
        yield key, child, place


def _check_text(text: str, path: str) -> None:
    if "${" in text:
        _refuse(path, text, "interpolations are not allowed; write the value itself")
    if text == "???":
        _refuse(path, text, "the value is missing; fill it in")
    if len(text) > MAX_CHARS:
        _refuse(path, text, f"a string has at most {MAX_CHARS:,} characters")


def _check_special_keys(mapping: dict[str, Any], path: str, allowed: frozenset[str]) -> None:
    for key, value in mapping.items():
        place = f"{path}.{key}" if path else key
        match key:
            case "_target_":
                if not isinstance(value, str) or value not in allowed:
                    _refuse(place, value, _valid_targets(value, allowed))
            case "_partial_" | "_recursive_":
                if not isinstance(value, bool):
                    _refuse(place, value, "valid are true and false")
            case "_args_":
                if not isinstance(value, list | tuple):
                    _refuse(place, value, "valid is a list")
            case "_convert_":
                if value not in _CONVERT_MODES:
                    _refuse(place, value, f"valid are {', '.join(_CONVERT_MODES)}")
            case "hf_hub_path":
                if value is not None and not isinstance(value, str):
                    _refuse(place, value, "valid is a string or None")
            case _ if key.startswith("_") and key.endswith("_"):
                # No constructor has such an argument, and a later Hydra may give it a meaning.
                _refuse(
                    _shorten(place),
                    value,
                    "valid special keys: _target_, _partial_, _args_, _recursive_, _convert_",
                )


def _valid_targets(value: Any, allowed: frozenset[str]) -> str:
    if allowed is not ALLOWED_TARGETS:
        return f"it may not be built; valid are exactly {', '.join(sorted(allowed))}"
    name = value[-100:] if isinstance(value, str) else ""
    close = difflib.get_close_matches(name, sorted(ALLOWED_TARGETS), n=2, cutoff=0.5)
    examples = close or ["flextok.flextok_wrapper.FlexTok", "flextok.regularizers.quantize_fsq.FSQ"]
    return (
        "it may not be built; valid are exactly the names in flextok.utils.config_safety.ALLOWED_TARGETS, "
        f"such as {' or '.join(examples)}"
    )


def _refuse(path: str, value: Any, valid: str) -> NoReturn:
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits has no text
        text = f"a very long {type(value).__name__}"
    raise ValueError(f"config, {path or 'top level'}: {_shorten(text)} is refused: {valid}")


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
