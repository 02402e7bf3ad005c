"""Reading single settings of a config, and the one form in which a wrong one is reported."""

from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf


def refuse(field: str, value: Any, valid: str) -> NoReturn:
    """Raise the `ValueError` that names the field, its value and what would be valid."""
    raise ValueError(f"{field}={value!r} cannot be used; valid: {valid}")


def setting(cfg: DictConfig, field: str) -> Any:
    """The value of a field in plain types; None where the config does not have it."""
    value = OmegaConf.select(cfg, field)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def is_integer(value: Any) -> bool:
    """Whether a value is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def integer(cfg: DictConfig, field: str, *, minimum: int, why: str = "") -> int | None:
    """The value of a field that holds an integer, if it holds anything; `1e4` becomes 10000 in the config."""
    value = setting(cfg, field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
        OmegaConf.update(cfg, field, value)
    if value is not None and (not is_integer(value) or value < minimum):
        refuse(field, value, f"an integer of at least {minimum}{why}")
    return value
