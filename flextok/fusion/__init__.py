"""Several wordings of one question in one sequence: each is read by itself, the answer is read off all of them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextok.fusion.attention import FusionMask, fusion_attention
    from flextok.fusion.ensemble import combine_logits, generate_ensemble
    from flextok.fusion.generate import FusionOutput, generate_fused
    from flextok.fusion.items import Item, read_items
    from flextok.fusion.mass import attention_mass
    from flextok.fusion.matching import confidence, lemma_match
    from flextok.fusion.packing import (
        MissingTailWarning,
        PackedPrompt,
        concatenate_paraphrases_with_positions,
        pack_prompts,
        pack_segments,
    )
    from flextok.fusion.prompts import myriad_adjacency, myriad_segments, webqa_prompt
    from flextok.fusion.results import read_results, write_results
    from flextok.fusion.strategies import Beams, Greedy, Sampling

__all__ = [
    "Beams",
    "FusionMask",
    "FusionOutput",
    "Greedy",
    "Item",
    "MissingTailWarning",
    "PackedPrompt",
    "Sampling",
    "attention_mass",
    "combine_logits",
    "concatenate_paraphrases_with_positions",
    "confidence",
    "fusion_attention",
    "generate_ensemble",
    "generate_fused",
    "lemma_match",
    "myriad_adjacency",
    "myriad_segments",
    "pack_prompts",
    "pack_segments",
    "read_items",
    "read_results",
    "webqa_prompt",
    "write_results",
]
# Loaded on first use: transformers takes seconds, and a table of results is read without it.
_MODULES = {
    "attention": ("FusionMask", "fusion_attention"),
    "ensemble": ("combine_logits", "generate_ensemble"),
    "generate": ("FusionOutput", "generate_fused"),
    "items": ("Item", "read_items"),
    "mass": ("attention_mass",),
    "matching": ("confidence", "lemma_match"),
    "packing": (
        "MissingTailWarning",
        "PackedPrompt",
        "concatenate_paraphrases_with_positions",
        "pack_prompts",
        "pack_segments",
    ),
    "prompts": ("myriad_adjacency", "myriad_segments", "webqa_prompt"),
    "results": ("read_results", "write_results"),
    "strategies": ("Beams", "Greedy", "Sampling"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
