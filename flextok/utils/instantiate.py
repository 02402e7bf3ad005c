"""From a config to modules: check it, build its parts with Hydra, and say clearly what does not fit."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import hydra.utils
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from flextok.utils.config_safety import sanitize_hydra_config

# The arguments of FlexTok, which are the top-level keys of its config.
PARTS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")

MAX_INTEGER = 10_000_000  # in the config of a file

_PIXEL_VAE, _KL_VAE = "flextok.pixel_vae.PixelVAE", "flextok.vae_wrapper.StableDiffusionVAE"
_SEQUENTIAL = "flextok.model.utils.wrappers.SequentialModuleDictWrapper"
_PART_TARGETS = {
    "vae": (_KL_VAE, _PIXEL_VAE),
    "encoder": (_SEQUENTIAL,),
    "decoder": (_SEQUENTIAL,),
    "regularizer": ("flextok.regularizers.quantize_fsq.FSQ",),
    "flow_matching_noise_module": ("flextok.flow_matching.noise_modules.MinRFNoiseModule",),
    "pipeline": ("flextok.flow_matching.pipelines.MinRFPipeline",),
}
# What FlexTok asks of single modules: part, name, attribute.
_NEEDED = (("encoder", "enc_register_module", "n_max"), ("decoder", "dec_nested_dropout", "eval_keep_k_read_key"))

_FLEXTOK_TARGETS = ("flextok.flextok_wrapper.FlexTok", "flextok.flextok_wrapper.FlexTokFromHub")


def instantiate_parts(config: Any) -> dict[str, Any]:
    """Sanitise a FlexTok config and build its parts: the keyword arguments of `FlexTok`.

    `pipeline` comes back as a partial that waits for its `model`, the others as modules. Other top-level keys
    (`_target_`, entries of a `config.json` that are not ours) are checked but not built. Raises ValueError
    naming the part that is missing, unsafe, or cannot be built.
    """
    config = sanitize_hydra_config(config)
    _check_parts(config)
    return {name: _build_part(config, name) for name in PARTS}


def build_model(config: Any, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Sanitise a config and build the model it describes: a FlexTok, unless `_target_` names another module.

    Its weights, which have these names and `shapes`, are to be loaded next, so the random ones it starts with leave
    torch's generator as it was. Raises ValueError.
    """
    check_fits(config, shapes)
    config = sanitize_hydra_config(config)
    target = config.get("_target_", _FLEXTOK_TARGETS[0])
    with torch.random.fork_rng(devices=[]):
        if target not in _FLEXTOK_TARGETS:
            model = _instantiate(config, "top level")
        else:
            parts = instantiate_parts(config)
            from flextok.flextok_wrapper import FlexTok  # which imports this module

            model = FlexTok(**parts)
    if not isinstance(model, nn.Module):
        raise ValueError(f"config, _target_: {target} builds a {type(model).__name__}, not a module")
    return model


def check_fits(config: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless a config builds a model whose weights have the names and `shapes` of those in a file.

    The model is built without memory for its weights, and numbers that cannot belong to the file are refused before, so
    a small file cannot ask for a large model. A VAE with `hf_hub_path` is left out: it has the size of what lies there.
    """
    config = sanitize_hydra_config(config)
    check_numbers(config, shapes)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if config.get("_target_", _FLEXTOK_TARGETS[0]) in _FLEXTOK_TARGETS:
            _check_parts(config)
            left_out = "vae" if config["vae"].get("hf_hub_path") is not None else None
            parts = {name: _build_part(config, name) for name in PARTS if name != left_out}
            del parts["pipeline"]  # no module
            model: Any = nn.ModuleDict(parts)
            shapes = {name: shape for name, shape in shapes.items() if name.partition(".")[0] != left_out}
        elif config.get("hf_hub_path") is not None:
            return
        else:
            model = _instantiate(config, "top level")
        if not isinstance(model, nn.Module):
            return
        try:
            model.load_state_dict({name: torch.empty(list(shape)) for name, shape in shapes.items()}, strict=True)
        except RuntimeError as error:
            _, _, differences = str(error).partition("\n")
            raise ValueError(f"weights and config disagree:\n{differences}") from error


def check_numbers(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Bound what takes memory even without weights: layers, and the sizes that registers list."""
    num_values = sum(prod(shape) for shape in shapes.values())
    limits = {"depth": len(shapes), "num_layers": len(shapes), "n_min": num_values, "n_max": num_values}
    totals: Counter[str] = Counter()
    for place, key, value in _integers(config, "", ""):
        if key == "_args_":
            raise ValueError(f"config, {place}: {value} is refused: numbers are given by name, not in _args_")
        totals[key] += abs(value)
        if abs(value) > MAX_INTEGER or totals[key] > limits.get(key, totals[key]):
            valid = f"the file holds {len(shapes):,} tensors of {num_values:,} numbers, too few for this"
            raise ValueError(f"config, {place}: {value} is refused: {valid}")


def _integers(node: Any, place: str, key: str) -> Iterator[tuple[str, str, int]]:
    """Place, key and value of every integer; those of a list have the key of the list."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _integers(child, f"{place}.{name}" if place else name, name)
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from _integers(child, f"{place}[{index}]", key)
    elif type(node) is int:
        yield place, key, node


def _check_parts(config: Mapping[str, Any]) -> None:
    for name in PARTS:
        if not isinstance(config.get(name), dict) or "_target_" not in config[name]:
            raise ValueError(
                f"config, {name}: a FlexTok config has a dict with _target_ here; parts: {', '.join(PARTS)}"
            )
    for name, targets in _PART_TARGETS.items():
        target = config[name]["_target_"]
        if target not in targets:
            raise ValueError(f"config, {name}._target_: {target} is refused; valid here: {' or '.join(targets)}")
        if config[name].get("_partial_", False) is not (name == "pipeline"):
            reason = "its model is only known later" if name == "pipeline" else "only the pipeline waits for its model"
            raise ValueError(f"config, {name}: needs _partial_: {str(name == 'pipeline').lower()}, for {reason}")
    _check_latent_widths(config)


def _build_part(config: Mapping[str, Any], name: str) -> Any:
    part = _instantiate(config[name], name)
    if name == "pipeline":
        try:
            part(model=None)
        except TypeError as error:
            raise ValueError(f"config, pipeline: {error}") from error
    for owner, module, attribute in _NEEDED:
        if owner == name and not hasattr(dict(part.module_dict).get(module), attribute):
            raise ValueError(f"config, {name}.module_dict.{module}: a FlexTok needs a module with {attribute} here")
    return part


def _instantiate(config: dict[str, Any], name: str) -> Any:
    try:
        return hydra.utils.instantiate(config)
    except (HydraException, OmegaConfBaseException, TypeError, AttributeError, LookupError) as error:
        # A missing optional package or an unreachable hub is not the config's fault: show that error itself.
        if isinstance(error.__cause__, ImportError | OSError):
            raise error.__cause__ from error
        raise ValueError(f"config, {name}: {error}") from error


def _check_latent_widths(config: Mapping[str, Any]) -> None:
    """One channel per FSQ level, on the way in and out; else the first batch would fail obscurely."""
    regularizer = config["regularizer"]
    levels = regularizer.get("levels")
    if not isinstance(levels, list | tuple):
        return
    for part, key, width_name, own_key in (
        ("encoder", "write_key", "dim_out", regularizer.get("latents_read_key")),
        ("decoder", "read_key", "dim_in", regularizer.get("quants_write_key")),
    ):
        for name, module in _modules(config[part]):
            width = module.get(width_name)
            if own_key is not None and module.get(key) == own_key and isinstance(width, int) and width != len(levels):
                raise ValueError(
                    f"config, {part}.module_dict.{name}.{width_name}: {width} does not fit "
                    f"regularizer.levels ({levels}); valid is {len(levels)}"
                )


def _modules(part: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    modules = part.get("module_dict")
    if isinstance(modules, dict):
        yield from ((name, module) for name, module in modules.items() if isinstance(module, dict))
