"""Sparse attention from small rules: maskers that each add keys, the mask they make, and attention under it.

config = build_config([{"type": "SinkMasker", "sink_size": 4}, {"type": "OracleTopK", "heavy_size": 0.1}])
attention = ResearchAttention.create_from_config(config)
output, weights = attention.custom_attention(None, q, k, v, None, scaling, 0.0, {})
"""

from flextok.attention.sparse.adaptive_sampling import AdaptiveSamplingMasker, AdaptiveSamplingMaskerConfig
from flextok.attention.sparse.attention import masked_attention
from flextok.attention.sparse.block_mask import geometric_block_mask, to_block_mask, to_mask_mod
from flextok.attention.sparse.build import build_config
from flextok.attention.sparse.causal import CausalMasker, CausalMaskerConfig
from flextok.attention.sparse.config import (
    FixedMaskerConfig,
    MaskerConfig,
    SamplingMaskerConfig,
    TopKMaskerConfig,
    TopPMaskerConfig,
)
from flextok.attention.sparse.flex import flex_masked_attention, to_score_mod
from flextok.attention.sparse.gathered import gathered_attention
from flextok.attention.sparse.geometric import GeometricMasker, KeyRange
from flextok.attention.sparse.hash_attention import HashAttentionTopKMasker, HashAttentionTopKMaskerConfig
from flextok.attention.sparse.hat_weights import convert_hat_checkpoint, load_hat_weights, save_hat_weights
from flextok.attention.sparse.local import LocalMasker, LocalMaskerConfig
from flextok.attention.sparse.magic_pig import MagicPig, MagicPigConfig
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.masker import AttentionTensorDimensions, FixedMasker, ResearchMasker, SamplingMasker
from flextok.attention.sparse.oracle_top_k import OracleTopK, OracleTopKConfig
from flextok.attention.sparse.oracle_top_p import OracleTopPMasker, OracleTopPMaskerConfig
from flextok.attention.sparse.presets import PRESETS, preset
from flextok.attention.sparse.random_sampling import RandomSamplingMasker, RandomSamplingMaskerConfig
from flextok.attention.sparse.registry import MaskerRegistry
from flextok.attention.sparse.research import ResearchAttention, ResearchAttentionConfig
from flextok.attention.sparse.selection import Selection
from flextok.attention.sparse.sink import SinkMasker, SinkMaskerConfig
from flextok.attention.sparse.top_k import TopKMasker
from flextok.attention.sparse.top_p import TopPMasker
from flextok.attention.sparse.windowed import windowed_attention

__all__ = [
    "AdaptiveSamplingMasker",
    "AdaptiveSamplingMaskerConfig",
    "AttentionTensorDimensions",
    "CausalMasker",
    "CausalMaskerConfig",
    "FixedMasker",
    "FixedMaskerConfig",
    "GeometricMasker",
    "HashAttentionTopKMasker",
    "HashAttentionTopKMaskerConfig",
    "KeyRange",
    "LocalMasker",
    "LocalMaskerConfig",
    "MagicPig",
    "MagicPigConfig",
    "Mask",
    "MaskerConfig",
    "MaskerRegistry",
    "OracleTopK",
    "OracleTopKConfig",
    "OracleTopPMasker",
    "OracleTopPMaskerConfig",
    "PRESETS",
    "RandomSamplingMasker",
    "RandomSamplingMaskerConfig",
    "ResearchAttention",
    "ResearchAttentionConfig",
    "ResearchMasker",
    "SamplingMasker",
    "SamplingMaskerConfig",
    "Selection",
    "SinkMasker",
    "SinkMaskerConfig",
    "TopKMasker",
    "TopKMaskerConfig",
    "TopPMasker",
    "TopPMaskerConfig",
    "build_config",
    "convert_hat_checkpoint",
    "flex_masked_attention",
    "gathered_attention",
    "geometric_block_mask",
    "load_hat_weights",
    "masked_attention",
    "preset",
    "save_hat_weights",
    "to_block_mask",
    "to_mask_mod",
    "to_score_mod",
    "windowed_attention",
]
