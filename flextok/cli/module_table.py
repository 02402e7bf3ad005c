"""What each module of a model reads and writes, found by one forward pass that computes only shapes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hydra.utils
import torch
from torch import Tensor, nn

from flextok.model.utils.keys import keys_of

logger = logging.getLogger(__name__)

# The order of a training forward. The VAE is left out: latents are fed instead.
PARTS = ("encoder", "regularizer", "flow_matching_noise_module", "decoder")


@dataclass
class ModuleRow:
    """One module: where it sits, the keys it reads and writes, its size, and the shape under each written
    key."""

    part: str
    name: str
    class_name: str
    reads: list[str]
    writes: list[str]
    num_parameters: int | None
    shapes: dict[str, str] = field(default_factory=dict)
    has_run: bool = False


def trace_modules(config: Mapping[str, Any], latent_shape: tuple[int, int, int]) -> list[ModuleRow]:
    """One row per module of a FlexTok config, in the order in which they run, without memory for any weight.

    Whatever the config names is built, so one from elsewhere has to be sanitised before. `latent_shape` is
    `(channels, height, width)` of the VAE's latents for one image. Rows after a module that fails have no
    shapes; the failure is logged.
    """
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {name: hydra.utils.instantiate(config[name]) for name in PARTS}
    rows = [_vae_row(config["vae"])]
    handles = []
    for part_name, part in parts.items():
        for name, module in _steps(part_name, part.eval()):
            row = _module_row(part_name, name, module)
            rows.append(row)
            handles.append(module.register_forward_hook(_shape_recorder(row)))
    latents_key = config["flow_matching_noise_module"]["clean_images_read_key"]
    data: dict[str, Any] = {latents_key: [torch.empty(1, *latent_shape, device="meta")]}
    rows[0].shapes = {key: describe_value(value) for key, value in data.items()}
    try:
        with torch.no_grad():
            for part in parts.values():
                data = part(data)
    # Whatever a module may raise: the table of what ran until then says more than a traceback.
    except (RuntimeError, NotImplementedError, KeyError, ValueError, TypeError, AttributeError) as error:
        stopped = next((row.name for row in rows[1:] if not row.has_run), "the last module")
        logger.warning("shapes end at %s: %s: %s", stopped, type(error).__name__, error)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def describe_value(value: Any) -> str:
    """The shape of a tensor, the entries of a list (there is one sample, so mostly one), else a type."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, torch.Size):
        return str(tuple(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        entries = [describe_value(entry) for entry in value]
        if len(entries) == 1 and isinstance(value[0], Tensor):
            return entries[0]
        return f"({', '.join(entries)})"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return type(value).__name__


def _steps(part_name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    steps = getattr(part, "module_dict", None)
    if steps is None:
        yield part_name, part
    else:
        yield from steps.items()


def _module_row(part_name: str, name: str, module: nn.Module) -> ModuleRow:
    reads, writes = keys_of(vars(module))
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    return ModuleRow(part_name, name, type(module).__name__, reads, writes, num_parameters)


def _vae_row(settings: Mapping[str, Any]) -> ModuleRow:
    # Not built: a VAE may have to be downloaded first.
    reads, writes = keys_of(settings)
    return ModuleRow("vae", "vae", str(settings["_target_"]).rpartition(".")[2], reads, writes, None)


def _shape_recorder(row: ModuleRow) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        row.has_run = True
        if isinstance(output, Mapping):
            row.shapes = {key: describe_value(output[key]) for key in row.writes if key in output}

    return record
