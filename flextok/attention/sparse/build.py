"""`build_config`: a list of maskers from plain values, as a file or a command line holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from flextok.attention.sparse.config import MaskerConfig
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.research import ResearchAttentionConfig, check_one_sampler


def build_config(specs: Any) -> ResearchAttentionConfig:
    """Configurations from `[{"type": "SinkMasker", "sink_size": 128}, ...]`: the name of a masker class and its fields.

    Raises:
        ValueError: an unknown type, an unknown or missing field, a bad value, two samplers; the message names the key.
    """
    if isinstance(specs, str | Mapping) or not isinstance(specs, Sequence):
        raise ValueError(f"masker_configs={specs!r}; valid: a list of maskers, each with its type and fields")
    configs = [_config_of(spec, f"masker_configs[{place}]") for place, spec in enumerate(specs)]
    check_one_sampler([MaskerRegistry.get_masker_class(type(config)) for config in configs])
    return ResearchAttentionConfig(configs)


def _config_of(spec: Any, where: str) -> MaskerConfig:
    known = {owner.__name__: kind for kind, owner in MaskerRegistry.get_all_registered_types().items()}
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where}={spec!r}; valid: a mapping with type and the fields of that masker")
    if not isinstance(spec.get("type"), str) or spec["type"] not in known:
        raise ValueError(f"{where}.type={spec.get('type')!r}; valid: {', '.join(sorted(known))}")
    config_type = known[spec["type"]]
    given = {name: value for name, value in spec.items() if name != "type"}
    valid = {each.name: each for each in fields(config_type) if each.init}
    unknown = [name for name in given if name not in valid]
    if unknown:
        raise ValueError(f"{where}.{unknown[0]}: {spec['type']} has no such field; valid: {', '.join(valid)}")
    needed = [name for name, each in valid.items() if each.default is MISSING and each.default_factory is MISSING]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{where}.{missing[0]}: missing; {spec['type']} needs {', '.join(needed)}")
    try:
        return config_type(**given)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
