"""Finds impossible configurations within seconds, before data or weights are read.

Every message names the field, its value and what would be valid. Misspelt names are Hydra's job. A field
that a configuration does not have is not checked, so training and evaluation share these checks.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flextok.config_fields import integer, is_integer, refuse, setting
from flextok.config_sizes import check_sizes

# Those of flextok/attention/engine.py, whose import would wait for torch.
ATTENTION_BACKENDS = ("auto", "flex", "varlen", "sdpa", "reference")
# Weights stay float32, for the optimizer and for the average: other precisions of Lightning are not supported.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
MANDATORY = {
    "size.encoder_depth": "an integer of at least 1 (model=flextok leaves it open)",
    "size.decoder_depth": "an integer of at least 1 (model=flextok leaves it open)",
    "data.root": "a folder with images",
    "data.path": "a folder or URL of LitData chunks (data=streaming), a folder or the name of a Hugging Face data set",
    "attention.hash.file": "a .safetensors file with the weights of HashAttention for the trunk that attends",
    "latent.path": "the local folder of a diffusers AutoencoderKL, or its name on the hub (owner/name)",
}
COUNTS = (
    *("data.batch_size", "data.eval_batch_size", "data.image_size", "latent.downsample", "validation.num_sigmas"),
    *("trainer.val_check_interval", "trainer.log_every_n_steps", "trainer.accumulate_grad_batches"),
    *("callbacks.last.every_n_steps", "callbacks.last.keep_every_n_steps"),
    *("callbacks.pictures.num_images", "callbacks.pictures.timesteps", "callbacks.loss_buckets.num_times"),
)
KEEP_K_FIELDS = ("validation.keep_ks", "evaluation.keep_ks", "callbacks.pictures.keep_ks")
MAX_SEED = 2**32 - 1  # What Lightning and NumPy take.


def check_config(cfg: DictConfig) -> None:
    """Raise `ValueError` for the first setting that cannot work; counts such as 1e4 become integers in `cfg`."""
    _check_mandatory(cfg)
    _check_named_nodes(cfg)
    _check_numbers(cfg)
    check_sizes(cfg)
    _check_keep_ks(cfg)
    _check_precision(cfg)
    _check_attention(cfg)
    _check_paths(cfg)
    _check_start(cfg)


def _check_mandatory(cfg: DictConfig) -> None:
    # Not `OmegaConf.missing_keys`, which resolves the whole config and stumbles over what later checks explain.
    for field, valid in MANDATORY.items():
        group, _, name = field.rpartition(".")
        node = OmegaConf.select(cfg, group)
        if isinstance(node, DictConfig) and OmegaConf.is_missing(node, name):
            raise ValueError(f"{field} is missing; give {field}=..., valid: {valid}")


def _check_numbers(cfg: DictConfig) -> None:
    for field in COUNTS:
        integer(cfg, field, minimum=1)
    for field in ("trainer.max_steps", "optimizer.total_steps"):
        integer(cfg, field, minimum=1, why=" (the learning-rate schedule needs to know its end)")
    if "seed" in cfg and not (is_integer(cfg.seed) and 0 <= cfg.seed <= MAX_SEED):
        refuse("seed", cfg.seed, f"an integer from 0 to {MAX_SEED}")
    for field in ("optimizer.lr", "callbacks.ema.decay"):
        value = setting(cfg, field)
        if value is not None and not (isinstance(value, int | float) and 0 < value < 1):
            refuse(field, value, "a number between 0 and 1, both excluded")
    warmup, total = integer(cfg, "optimizer.warmup_steps", minimum=0), setting(cfg, "optimizer.total_steps")
    if warmup is not None and total is not None and warmup >= total:
        refuse("optimizer.warmup_steps", warmup, f"0 to {total - 1} (below optimizer.total_steps={total})")


def _check_keep_ks(cfg: DictConfig) -> None:
    num_registers = setting(cfg, "size.registers")
    for field in KEEP_K_FIELDS:
        keep_ks = setting(cfg, field)
        if keep_ks is None or num_registers is None:
            continue
        if not isinstance(keep_ks, list) or not keep_ks:
            refuse(field, keep_ks, f"null or a non-empty list of integers from 1 to {num_registers}")
        for keep_k in keep_ks:
            if not is_integer(keep_k) or not 1 <= keep_k <= num_registers:
                refuse(
                    field,
                    keep_ks,
                    f"integers from 1 to {num_registers} (size.registers), not {keep_k!r}",
                )


def _check_precision(cfg: DictConfig) -> None:
    precision = setting(cfg, "trainer.precision")
    if precision is not None and str(precision) not in PRECISIONS:
        refuse("trainer.precision", precision, ", ".join(PRECISIONS))
    strategy = setting(cfg, "trainer.strategy._target_")
    if strategy is not None and strategy.endswith("ShardedStrategy") and str(precision) in ("16-mixed", "16"):
        refuse("trainer.precision", precision, "bf16-mixed or 32-true with trainer=fsdp, which has no loss scaler")
    if str(precision) in ("16-mixed", "16") and setting(cfg, "optimizer.fused"):
        # It unscales gradients in its own step: before, they cannot be clipped or measured.
        refuse("optimizer.fused", True, f"false where trainer.precision={precision}")


def _check_attention(cfg: DictConfig) -> None:
    backend = setting(cfg, "attention.backend")
    if backend is not None and backend not in ATTENTION_BACKENDS:
        refuse("attention.backend", backend, ", ".join(ATTENTION_BACKENDS))
    if "maskers" not in (OmegaConf.select(cfg, "attention") or {}):
        return
    if "trainer" in cfg:
        raise ValueError(
            "attention=sparse is for evaluation: what maskers select has no gradient, so a model would learn under a "
            "choice that it cannot change; valid here: attention=auto, sdpa, varlen, flex or reference"
        )
    from flextok.model.sparse_attention import SparseAttention

    SparseAttention.from_mapping(OmegaConf.to_container(cfg.attention, resolve=True))  # type: ignore[arg-type]


def _check_named_nodes(cfg: DictConfig) -> None:
    """Callbacks and loggers are mappings from a name to something with a `_target_`, or to null."""
    for group in ("callbacks", "logger"):
        entries = OmegaConf.select(cfg, group)
        if entries is None:
            continue
        if not isinstance(entries, DictConfig):
            refuse(group, entries, f"a mapping such as {group}.<name>: {{_target_: ...}}; {group}=none for none")
        nodes: dict[Any, Any] = dict(entries.items())
        for name, entry in nodes.items():
            if entry is not None and not (isinstance(entry, DictConfig) and "_target_" in entry):
                refuse(f"{group}.{name}", entry, "null (leaves it out) or a mapping with a _target_")


def _check_paths(cfg: DictConfig) -> None:
    for field, valid in (("ckpt_path", "null, auto, or an"), ("init_from", "null, or an"), ("data.root", "an")):
        value = setting(cfg, field)
        is_auto = field == "ckpt_path" and value == "auto"
        is_url = field == "data.root" and re.match(r"[a-z]\w+:", str(value))
        if value is not None and not is_auto and not is_url and not Path(value).expanduser().exists():
            refuse(field, value, f"{valid} existing path (looked in {os.getcwd()})")
    vae = setting(cfg, "latent.path")
    if vae is not None and _looks_local(vae) and not Path(vae).expanduser().is_dir():
        refuse("latent.path", vae, f"{MANDATORY['latent.path']} (looked in {os.getcwd()})")


def _looks_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()


def _check_start(cfg: DictConfig) -> None:
    """Weights to start from must belong to the same quantizer; only the header of the file is read."""
    init_from = setting(cfg, "init_from")
    if init_from is None:
        return
    if setting(cfg, "ckpt_path") not in (None, "auto"):
        refuse("init_from", init_from, "null where ckpt_path is a path: a resumed run brings its weights")
    if Path(init_from).suffix != ".safetensors":
        refuse("init_from", init_from, "a .safetensors file (to continue a run use ckpt_path)")
    theirs = _stored_levels(Path(init_from).expanduser())
    ours = setting(cfg, "model.regularizer.levels")
    starts_anew = setting(cfg, "initialize.fresh")
    if theirs is not None and ours is not None and list(theirs) != list(ours) and not starts_anew:
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
