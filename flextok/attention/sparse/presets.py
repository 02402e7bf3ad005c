"""Lists of maskers to start from, by name."""

from collections.abc import Mapping
from typing import Any

from flextok.attention.sparse.build import build_config
from flextok.attention.sparse.research import ResearchAttentionConfig

Spec = Mapping[str, Any]

_AROUND: tuple[Spec, ...] = (
    {"type": "SinkMasker", "sink_size": 128},
    {"type": "LocalMasker", "window_size": 128},
)
PRESETS: dict[str, tuple[Spec, ...]] = {
    # The first keys and the last: what every other list starts with.
    "sink_local": _AROUND,
    "oracle_top_k": (*_AROUND, {"type": "OracleTopK", "heavy_size": 0.1}),
    # Needs a file of weights: `preset("hash", hat_weight_file=...)`.
    "hash": (
        *_AROUND,
        {
            "type": "HashAttentionTopKMasker",
            "heavy_size": 0.05,
            "hat_bits": 32,
            "hat_mlp_layers": 3,
            "hat_mlp_hidden_size": 128,
            "hat_mlp_activation": "silu",
        },
    ),
    "magicpig": (*_AROUND, {"type": "MagicPig", "lsh_l": 8, "lsh_k": 8}),
    "vattention": (
        *_AROUND,
        {"type": "OracleTopK", "heavy_size": 0.05},
        {
            "type": "AdaptiveSamplingMasker",
            "base_rate_sampling": 0.05,
            "epsilon": 0.1,
            "delta": 0.1,
            "init_offset": 128,
            "local_offset": 128,
        },
    ),
}


def preset(name: str, **fields: Any) -> ResearchAttentionConfig:
    """The configuration of a preset, with other values for some fields of its last masker.

    Raises:
        ValueError: no such preset, no such field, a bad value.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; valid: {', '.join(PRESETS)}")
    *others, last = PRESETS[name]
    return build_config([*others, {**last, **fields}])
