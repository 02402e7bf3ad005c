"""One file that holds a model: its weights, and in the header the config that builds it.

The format is safetensors. Each top-level key of the config is one metadata key and its value is `str(value)`,
so that files written here and the released ones are the same. Files are untrusted: everything wrong with one
is a ValueError that names the file, and nothing is imported or built before its whole config passed
`sanitize_hydra_config`.
"""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flextok.utils.config_safety import sanitize_hydra_config
from flextok.utils.config_text import format_value, parse_value
from flextok.utils.instantiate import PARTS, build_model, check_fits, instantiate_parts

__all__ = [
    "atomic_path",
    "check_file_fits",
    "instantiate_parts",
    "load_metadata",
    "load_model_from_safetensors",
    "load_safetensors",
    "load_shapes",
    "sanitize_hydra_config",
    "save_safetensors",
]

PathLike = str | os.PathLike[str]

# What the safetensors library accepts, too; checked here for a message that says what is wrong.
MAX_HEADER_BYTES = 100_000_000
MAX_METADATA_CHARS = 4_000_000

_sanitize_hydra_config = sanitize_hydra_config  # the name that users of the published code know


def load_model_from_safetensors(
    path: PathLike, device: str | torch.device | None = None, to_eval: bool = True
) -> nn.Module:
    """Build the model that a checkpoint describes and load its weights, strictly.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged, if its config is
    missing, unsafe or does not build a model, or if weights and model disagree: the message lists missing,
    unexpected and misshaped weights, and no memory was taken for them. A config may name a VAE by
    `hf_hub_path`, which diffusers then reads from that folder or from the hub.
    """
    config = load_metadata(path)
    if not config:
        raise ValueError(f"{path}: no config in the metadata; was it written by save_safetensors?")
    with _errors_name(path):
        model = build_model(config, load_shapes(path))
    tensors = load_safetensors(path, return_metadata=False)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: weights and config disagree. {error}") from error
    model = model.to(device) if device is not None else model
    return model.eval() if to_eval else model


def check_file_fits(path: PathLike, config: Any) -> None:
    """Raise ValueError, naming the file, unless a FlexTok config has the weights in it; see `check_fits`."""
    shapes = load_shapes(path)
    with _errors_name(path):
        check_fits({name: value for name, value in sanitize_hydra_config(config).items() if name in PARTS}, shapes)


def load_safetensors(path: PathLike, return_metadata: bool = True) -> Any:
    """Read a checkpoint: `(tensors, config)`, or only the tensors (name -> CPU tensor).

    The config comes back parsed and sanitised, so that it is safe to hand to `hydra.utils.instantiate`; it is
    empty if the file has no metadata. Raises FileNotFoundError or ValueError.
    """
    config = load_metadata(path) if return_metadata else None
    _check_container(Path(path))
    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    return (tensors, config) if return_metadata else tensors


def load_shapes(path: PathLike) -> dict[str, list[int]]:
    """Name -> shape of the weights of a checkpoint, without reading any; raises as `load_safetensors`."""
    _check_container(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def load_metadata(path: PathLike) -> dict[str, Any]:
    """The parsed and sanitised config in a checkpoint's header, without reading any weight; raises as
    `load_safetensors`."""
    _check_container(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    num_chars = sum(len(key) + len(text) for key, text in metadata.items())
    if num_chars > MAX_METADATA_CHARS:
        raise ValueError(f"{path}: {num_chars:,} characters of metadata; at most {MAX_METADATA_CHARS:,} are read")
    config = {}
    for key, text in metadata.items():
        try:
            config[key] = parse_value(text)
        except ValueError as error:
            raise ValueError(f"{path}: metadata {key!r}: {error}") from error
    with _errors_name(path):
        return sanitize_hydra_config(config)


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: PathLike, metadata_dict: Mapping[str, Any] | None = None
) -> None:
    """Write weights and config as one checkpoint; a crash leaves the old file or the new one, never a half.

    Tensors may share memory, be non-contiguous or lie on any device. `metadata_dict` (a dict or a DictConfig,
    which is resolved) must be a config that can be loaded again: ValueError names the part that could not.
    """
    metadata = _format_metadata(metadata_dict)
    with atomic_path(path) as temporary:
        save_file(_independent_tensors(state_dict), temporary, metadata=metadata)


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary path in the same folder, which replaces `path` if and only if the block succeeds.

    Its content is on the disk before it has its name: a machine that loses power leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes files that only their owner can read; a new file has the rights that the user's umask gives.
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _format_metadata(metadata_dict: Mapping[str, Any] | None) -> dict[str, str]:
    if OmegaConf.is_config(metadata_dict):
        metadata_dict = OmegaConf.to_container(metadata_dict, resolve=True)  # type: ignore[assignment]
    metadata = {}
    for key, value in sanitize_hydra_config(dict(metadata_dict or {})).items():
        try:
            metadata[key] = format_value(value)
        except ValueError as error:
            raise ValueError(f"metadata {key!r} {error}") from error
    return metadata


def _independent_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory: safetensors refuses to write others."""
    tensors = {}
    seen_storages = set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen_storages:
            tensor = tensor.clone()
        seen_storages.add(storage)
        tensors[name] = tensor
    return tensors


def _check_container(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the file in it, such as {path / 'model.safetensors'}")
    num_bytes = path.stat().st_size
    if num_bytes < 8:
        raise ValueError(f"{path}: {num_bytes} bytes are too few for a safetensors file; is it truncated?")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: not a safetensors file: header of {header_bytes:,} bytes (at most {MAX_HEADER_BYTES:,})"
        )
    if header_bytes > num_bytes - 8:
        raise ValueError(f"{path}: truncated: a header of {header_bytes:,} bytes in a file of {num_bytes:,}")


@contextmanager
def _errors_name(path: PathLike) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
