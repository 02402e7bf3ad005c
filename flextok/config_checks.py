"""Finds impossible configurations within seconds, before data or weights are read.

Every message names the field, its value and what would be valid. Misspelt names are Hydra's job. A field
that a configuration does not have is not checked, so training and evaluation share these checks.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

PRECISIONS = (
    *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16", "32", "16", "bf16", "64"),
)
MANDATORY = {
    "data.root": "a folder with images",
    "latent.path": "the local folder of a diffusers AutoencoderKL, or its name on the hub (owner/name)",
}
KEEP_K_FIELDS = ("validation.keep_ks", "evaluation.keep_ks", "callbacks.pictures.keep_ks")


def check_config(cfg: DictConfig) -> None:
    """Raise `ValueError` for the first setting that cannot work."""
    _check_mandatory(cfg)
    _check_named_nodes(cfg)
    _check_numbers(cfg)
    _check_keep_ks(cfg)
    _check_image_size(cfg)
    _check_precision(cfg)
    _check_paths(cfg)
    _check_start(cfg)


def _fail(field: str, value: Any, valid: str) -> NoReturn:
    raise ValueError(f"{field}={value!r} cannot be used; valid: {valid}")


def _get(cfg: DictConfig, field: str) -> Any:
    value = OmegaConf.select(cfg, field)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _check_mandatory(cfg: DictConfig) -> None:
    missing = OmegaConf.missing_keys(cfg)
    for field, valid in MANDATORY.items():
        if field in missing:
            raise ValueError(f"{field} is missing; give {field}=..., valid: {valid}")


def _check_numbers(cfg: DictConfig) -> None:
    for field in ("data.batch_size", "data.image_size", "size.registers", "size.patch"):
        value = _get(cfg, field)
        if value is not None and (not isinstance(value, int) or value < 1):
            _fail(field, value, "an integer of at least 1")
    for field in ("trainer.max_steps", "optimizer.total_steps"):
        value = _get(cfg, field)
        if value is not None and (not isinstance(value, int) or value < 1):
            _fail(field, value, "an integer of at least 1 (the learning-rate schedule needs to know its end)")
    for field in ("optimizer.lr", "callbacks.ema.decay"):
        value = _get(cfg, field)
        if value is not None and (isinstance(value, str) or not 0 < value < 1):
            _fail(field, value, "a number between 0 and 1, both excluded")
    warmup, total = _get(cfg, "optimizer.warmup_steps"), _get(cfg, "optimizer.total_steps")
    if warmup is not None and total is not None and not 0 <= warmup < total:
        _fail("optimizer.warmup_steps", warmup, f"0 to {total - 1} (below optimizer.total_steps={total})")


def _check_keep_ks(cfg: DictConfig) -> None:
    num_registers = _get(cfg, "size.registers")
    for field in KEEP_K_FIELDS:
        keep_ks = _get(cfg, field)
        if keep_ks is None or num_registers is None:
            continue
        if not isinstance(keep_ks, list) or not keep_ks:
            _fail(field, keep_ks, f"null or a non-empty list of integers from 1 to {num_registers}")
        for keep_k in keep_ks:
            if not isinstance(keep_k, int) or not 1 <= keep_k <= num_registers:
                _fail(
                    field,
                    keep_ks,
                    f"integers from 1 to {num_registers} (size.registers), not {keep_k!r}",
                )


def _check_image_size(cfg: DictConfig) -> None:
    size, downsample, patch = (_get(cfg, f) for f in ("data.image_size", "latent.downsample", "size.patch"))
    if size is None or downsample is None or patch is None:
        return
    if size % (downsample * patch):
        factors = f"latent.downsample={downsample} times size.patch={patch}"
        _fail("data.image_size", size, f"a multiple of {downsample * patch} ({factors})")


def _check_precision(cfg: DictConfig) -> None:
    precision = _get(cfg, "trainer.precision")
    if precision is not None and str(precision) not in PRECISIONS:
        _fail("trainer.precision", precision, ", ".join(PRECISIONS))


def _check_named_nodes(cfg: DictConfig) -> None:
    """Callbacks and loggers are mappings from a name to something with a `_target_`, or to null."""
    for group in ("callbacks", "logger"):
        entries = OmegaConf.select(cfg, group)
        if entries is None:
            continue
        if not isinstance(entries, DictConfig):
            _fail(group, entries, f"a mapping such as {group}.<name>: {{_target_: ...}}, or null")
        nodes: dict[Any, Any] = dict(entries.items())
        for name, entry in nodes.items():
            if entry is not None and not (isinstance(entry, DictConfig) and "_target_" in entry):
                _fail(f"{group}.{name}", entry, "null (leaves it out) or a mapping with a _target_")


def _check_paths(cfg: DictConfig) -> None:
    for field, valid in (("ckpt_path", "null, or an"), ("init_from", "null, or an"), ("data.root", "an")):
        value = _get(cfg, field)
        if value is not None and not Path(value).expanduser().exists():
            _fail(field, value, f"{valid} existing path (looked in {os.getcwd()})")
    vae = _get(cfg, "latent.path")
    if vae is not None and _looks_local(vae) and not Path(vae).expanduser().is_dir():
        _fail("latent.path", vae, f"{MANDATORY['latent.path']} (looked in {os.getcwd()})")


def _looks_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()


def _check_start(cfg: DictConfig) -> None:
    """Weights to start from must belong to the same quantizer; only the header of the file is read."""
    init_from = _get(cfg, "init_from")
    if init_from is None:
        return
    if _get(cfg, "ckpt_path") is not None:
        _fail("init_from", init_from, "null where ckpt_path is given: a resumed run brings its weights")
    if Path(init_from).suffix != ".safetensors":
        _fail("init_from", init_from, "a .safetensors file (to continue a run use ckpt_path)")
    theirs = _stored_levels(Path(init_from).expanduser())
    ours = _get(cfg, "model.regularizer.levels")
    if theirs is not None and ours is not None and list(theirs) != list(ours):
        raise ValueError(
            f"init_from={init_from!r} was trained with FSQ levels {list(theirs)}, "
            f"but model.regularizer.levels is {list(ours)}; valid: the same levels, size.levels={_as_override(theirs)}"
        )


def _stored_levels(path: Path) -> list[int] | None:
    from flextok.utils.checkpoint import load_metadata

    levels = load_metadata(path).get("regularizer", {}).get("levels")
    return None if levels is None else list(levels)  # None: loading the weights strictly will tell.


def _as_override(levels: Iterable[int]) -> str:
    return "[" + ",".join(str(level) for level in levels) + "]"
