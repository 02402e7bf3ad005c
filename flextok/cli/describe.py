"""Print every module of a model in the order in which they run: what it reads, what it writes, how large it
is.

  flextok describe model=flextok_d12_d12 dropout=attention_mask    any overrides of configs/train.yaml
  flextok describe runs/digits/2025-01-31_12-00-00                 a run
  flextok describe my_tokenizer/model.safetensors                  a checkpoint, or its folder

Shapes are those of one sample. Nothing is computed and no weight is read, so the largest model takes seconds,
too.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextok.cli.module_table import ModuleRow

LatentShape = tuple[int, int, int]

_HEADER = ("module", "class", "reads", "writes", "parameters")
_OFFICIAL_LATENTS: LatentShape = (16, 32, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="OVERRIDE|PATH",
        nargs="*",
        help="overrides of the training config, or one existing path",
    )
    parser.add_argument(
        "--trust", action="store_true", help="build whatever the config of a run names; only for runs of your own"
    )


def run(args: argparse.Namespace) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from flextok.cli.module_table import trace_modules
    from flextok.config import describe_error

    try:
        if len(args.what) == 1 and Path(args.what[0]).exists():
            config, latent_shape = _from_path(Path(args.what[0]), trust=args.trust)
        else:
            config, latent_shape = _from_overrides(args.what)
        rows = trace_modules(config, latent_shape)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(describe_error(error)) from error
    print("\n".join(_format_table(rows)))
    print()
    for name, total in _totals(rows).items():
        print(f"{name:<8} {total:>15,} parameters")
    print("(without the VAE)")
    return 0


def _from_overrides(overrides: list[str]) -> tuple[dict[str, Any], LatentShape]:
    from flextok.config import compose

    missing = [word for word in overrides if "=" not in word and not word.startswith("~")]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is neither an existing path nor an override such as model=tiny")
    return _from_full_config(compose(overrides))


def _from_full_config(config: Any) -> tuple[dict[str, Any], LatentShape]:
    from omegaconf import OmegaConf

    from flextok.cli.module_table import PARTS

    side = config.data.image_size // config.latent.downsample
    # The VAE is not built, so it may still lack the path to its weights.
    model: dict[str, Any] = {"vae": OmegaConf.to_container(config.model.vae, resolve=False)}
    model |= {part: OmegaConf.to_container(config.model[part], resolve=True) for part in PARTS}
    return model, (config.latent.channels, side, side)


def _from_path(path: Path, *, trust: bool) -> tuple[dict[str, Any], LatentShape]:
    from flextok.cli.module_table import PARTS
    from flextok.utils.checkpoint import load_metadata, load_shapes, sanitize_hydra_config
    from flextok.utils.instantiate import check_numbers

    if path.is_dir() and (path / "config.yaml").exists():
        return _from_run(path, trust=trust)
    if path.is_dir() and (path / "config.json").exists():
        config = sanitize_hydra_config(json.loads((path / "config.json").read_text(encoding="utf-8")))
    elif path.is_dir():
        raise ValueError(f"{path}: holds neither a run (config.yaml) nor a model (config.json)")
    else:
        config = load_metadata(path)
    weights = path / "model.safetensors" if path.is_dir() else path
    if weights.is_file():
        check_numbers(config, load_shapes(weights))
    if not all(isinstance(config.get(part), dict) for part in ("vae", *PARTS)):
        raise ValueError(f"{path}: its config is not that of a FlexTok")
    return config, _latent_shape(config)


def _from_run(path: Path, *, trust: bool) -> tuple[dict[str, Any], LatentShape]:
    from omegaconf import OmegaConf

    from flextok.training.checkpoints import run_config
    from flextok.utils.checkpoint import sanitize_hydra_config

    config = run_config(path)
    if not trust:
        try:
            config.model = sanitize_hydra_config(config.model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; a run of your own with modules of your own: --trust") from error
    sizes = [OmegaConf.select(config, name) for name in ("data.image_size", "latent.downsample", "latent.channels")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{path}: its config has no data.image_size, latent.downsample and latent.channels")
    return _from_full_config(config)


def _latent_shape(config: Mapping[str, Any]) -> LatentShape:
    """A checkpoint does not say how large its images are, but the encoder's patch grid does."""
    modules = [module for module in config["encoder"].get("module_dict", {}).values() if isinstance(module, Mapping)]
    patcher: Mapping[str, Any] = next((module for module in modules if "channels_in" in module), {})
    grid = next((module["max_sizes"] for module in modules if len(module.get("max_sizes", ())) == 2), None)
    if grid is None or len(patcher.get("patch_sizes", ())) != 2:
        return _OFFICIAL_LATENTS
    height, width = (cells * size for cells, size in zip(grid, patcher["patch_sizes"], strict=True))
    return patcher["channels_in"], height, width


def _totals(rows: "Iterable[ModuleRow]") -> dict[str, int]:
    totals = {"encoder": 0, "decoder": 0, "all": 0}
    for row in rows:
        totals["all"] += row.num_parameters or 0
        if row.part in totals:
            totals[row.part] += row.num_parameters or 0
    return totals


def _format_table(rows: "Iterable[ModuleRow]") -> Iterator[str]:
    """Each module takes as many lines as it has keys to read or to write."""
    cells = [line for row in rows for line in _cells(row)]
    widths = [max(len(line[i]) for line in [_HEADER, *cells]) for i in range(len(_HEADER))]
    for line in [_HEADER, tuple("-" * width for width in widths), *cells]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _cells(row: "ModuleRow") -> Iterator[tuple[str, ...]]:
    # A key without a shape was not written in this pass, say because it is only written in training.
    writes = [f"{key} {row.shapes.get(key, '-')}" for key in row.writes]
    for i in range(max(1, len(row.reads), len(writes))):
        yield (
            row.name if i == 0 else "",
            row.class_name if i == 0 else "",
            row.reads[i] if i < len(row.reads) else "",
            writes[i] if i < len(writes) else "",
            "" if i or row.num_parameters is None else f"{row.num_parameters:,}",
        )
