"""Write a trained model in the published form, for this package, the hub and the published code alike."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from flextok.utils.checkpoint import PathLike, atomic_path, sanitize_hydra_config, save_safetensors

logger = logging.getLogger(__name__)

_PACKERS = (
    "flextok.model.preprocessors.flex_seq_packing.BlockWiseSequencePacker",
    "flextok.model.preprocessors.nested_dropout_seq_packer.NestedDropoutSequencePacker",
)

# Modules and settings that released code does not know; none changes what a trained model answers.
_OUR_MODULES = ("flextok.model.preprocessors.dropout_sampler.DropoutSampler",)
_OUR_FIELDS = {
    "flextok.model.preprocessors.attention_masked_nested_dropout.AttentionMaskedNestedDropout": (
        "sampled_keep_k_read_key",
    ),
    "flextok.model.preprocessors.flex_seq_packing.BlockWiseSequencePacker": (
        "sampled_keep_k_read_key",
        "sampled_null_read_key",
    ),
    "flextok.model.preprocessors.nullcond.LearnedNullCond": ("sampled_null_read_key",),
    "flextok.model.preprocessors.nested_dropout_seq_packer.NestedDropoutSequencePacker": ("drop_masked",),
    "flextok.model.preprocessors.token_dropout.MaskedNestedDropout": ("sampled_keep_k_read_key",),
    "flextok.flow_matching.noise_modules.MinRFNoiseModule": ("timestep_shift",),
    "flextok.model.trunks.transformers.FlexTransformer": ("output_subsequences",),
    "flextok.vae_wrapper.StableDiffusionVAE": ("in_memory",),
}


def export_model(model: nn.Module, config: Any, out_dir: PathLike, *, overwrite: bool = False) -> Path:
    """Write `model.safetensors` (weights and config) and `config.json` (the same config) into `out_dir`.

    `config` is the FlexTok config that built the model. Returns the folder, which
    `FlexTokFromHub.from_pretrained` takes; the first file alone is enough for `load_model_from_safetensors`.
    Raises ValueError for a config that could not be loaded again, and FileExistsError if the folder holds a
    model and `overwrite` is false.
    """
    out_dir = Path(out_dir)
    weights_path, config_path = out_dir / "model.safetensors", out_dir / "config.json"
    for path in (weights_path, config_path):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another folder or allow overwriting")
    config = official_config(config)
    save_safetensors(model.state_dict(), weights_path, config)
    with atomic_path(config_path) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    logger.info("wrote %s and %s", weights_path, config_path)
    return out_dir


def official_config(config: Any) -> dict[str, Any]:
    """The config as the published code wants it: plain containers, no module or field of our own, every packer
    padding to 128.

    Results are the same with it. Interpolations of a DictConfig are resolved.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    return _official(sanitize_hydra_config(config))


def _official(node: Any) -> Any:
    if isinstance(node, list | tuple):
        # The published reader takes a tuple for a string.
        return [_official(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    ours = [key for key, child in node.items() if isinstance(child, Mapping) and child.get("_target_") in _OUR_MODULES]
    official = {key: _official(child) for key, child in node.items() if key not in ours}
    for field in _OUR_FIELDS.get(node.get("_target_", ""), ()):
        official.pop(field, None)
    pads = (official.get("pad_to_multiple") or 1) % 128 == 0 or official.get("max_seq_len") is not None
    if node.get("_target_") in _PACKERS and not pads:
        # The published attention wants a multiple of 128 whatever the mask; ours does not mind.
        official["pad_to_multiple"] = 128
    return official
