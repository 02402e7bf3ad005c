"""The model that the words of a command mean: overrides of the training config, a run, or a checkpoint."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LatentShape = tuple[int, int, int]
ModelConfig = tuple[dict[str, Any], LatentShape]
"""The config of a FlexTok, and `(channels, height, width)` of the latents of one image."""

_OFFICIAL_LATENTS: LatentShape = (16, 32, 32)


def read_model_config(what: Sequence[str], *, trust: bool) -> ModelConfig:
    """The model of one existing path, or of overrides.

    Args:
        trust: also take modules that a run names and that are not ours.
    """
    if len(what) == 1 and Path(what[0]).exists():
        return from_path(Path(what[0]), trust=trust)
    return from_overrides(what)


def from_overrides(overrides: Sequence[str]) -> ModelConfig:
    """The model of `configs/train.yaml` under these overrides."""
    from flextok.config import compose

    missing = [word for word in overrides if "=" not in word and not word.startswith("~")]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is neither an existing path nor an override such as model=tiny")
    return from_full_config(compose(overrides))


def from_full_config(config: Any) -> ModelConfig:
    """What a composed training config says about its model."""
    from omegaconf import OmegaConf

    from flextok.cli.module_table import PARTS

    side = config.data.image_size // config.latent.downsample
    # The VAE is not built, so it may still lack the path to its weights.
    model: dict[str, Any] = {"vae": OmegaConf.to_container(config.model.vae, resolve=False)}
    model |= {part: OmegaConf.to_container(config.model[part], resolve=True) for part in PARTS}
    return model, (config.latent.channels, side, side)


def from_path(path: Path, *, trust: bool) -> ModelConfig:
    """The model of a run folder, an exported folder or a checkpoint."""
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


def _from_run(path: Path, *, trust: bool) -> ModelConfig:
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
    return from_full_config(config)


def _latent_shape(config: Mapping[str, Any]) -> LatentShape:
    """A checkpoint does not say how large its images are, but the encoder's patch grid does."""
    modules = [module for module in config["encoder"].get("module_dict", {}).values() if isinstance(module, Mapping)]
    patcher: Mapping[str, Any] = next((module for module in modules if "channels_in" in module), {})
    grid = next((module["max_sizes"] for module in modules if len(module.get("max_sizes", ())) == 2), None)
    if grid is None or len(patcher.get("patch_sizes", ())) != 2:
        return _OFFICIAL_LATENTS
    height, width = (cells * size for cells, size in zip(grid, patcher["patch_sizes"], strict=True))
    return patcher["channels_in"], height, width
