"""From a config to modules: check it, build its parts with Hydra, and say clearly what does not fit."""

from collections.abc import Iterator, Mapping
from typing import Any

import hydra.utils
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from flextok.utils.config_safety import sanitize_hydra_config

# The arguments of FlexTok, which are the top-level keys of its config.
PARTS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")

_FLEXTOK_TARGETS = ("flextok.flextok_wrapper.FlexTok", "flextok.flextok_wrapper.FlexTokFromHub")


def instantiate_parts(config: Any) -> dict[str, Any]:
    """Sanitise a FlexTok config and build its parts: the keyword arguments of `FlexTok`.

    `pipeline` comes back as a partial that waits for its `model`, the others as modules. Other top-level keys
    (`_target_`, entries of a `config.json` that are not ours) are checked but not built. Raises ValueError
    naming the part that is missing, unsafe, or cannot be built.
    """
    config = sanitize_hydra_config(config)
    for name in PARTS:
        if not isinstance(config.get(name), dict) or "_target_" not in config[name]:
            raise ValueError(
                f"config, {name}: a FlexTok config has a dict with _target_ here; parts: {', '.join(PARTS)}"
            )
    _check_latent_widths(config)
    parts = {name: _instantiate(config[name], name) for name in PARTS}
    for name, part in parts.items():
        if name == "pipeline":
            if isinstance(part, nn.Module) or not callable(part) or not config[name].get("_partial_", False):
                raise ValueError("config, pipeline: needs _partial_: true, for its model is only known later")
        elif not isinstance(part, nn.Module):
            raise ValueError(f"config, {name}: {config[name]['_target_']} builds a {type(part).__name__}, not a module")
    return parts


def build_model(config: Any) -> nn.Module:
    """Sanitise a config and build the model it describes: a FlexTok, unless `_target_` names another module.

    Its weights are to be loaded next, so that the random ones it starts with leave torch's generator as it was. Raises
    ValueError.
    """
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


def _instantiate(config: dict[str, Any], name: str) -> Any:
    try:
        return hydra.utils.instantiate(config)
    except (HydraException, OmegaConfBaseException) as error:
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
