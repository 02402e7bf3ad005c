"""Lists of maskers with one dial: the share of keys that a query of a long text is to see."""

import math
from collections.abc import Callable
from typing import Any

Specs = list[dict[str, Any]]

# Beside hash tables and samplers every list holds the first keys and a window: of its keys this share.
_SINK, _WINDOW = 1 / 8, 1 / 4
_PLANES = 6


def _around(keys: int, sink: float, window: float) -> Specs:
    return [
        {"type": "SinkMasker", "sink_size": _at_least_one(sink * keys)},
        # A window in prefill, too.
        {"type": "LocalMasker", "window_size": _at_least_one(window * keys), "dense_when_short": False},
    ]


def _sink_local(keys: int, length: int) -> Specs:
    return _around(keys, _SINK, 1 - _SINK)


def _oracle_top_k(keys: int, length: int) -> Specs:
    return [*_around(keys, _SINK, _WINDOW), {"type": "OracleTopK", "heavy_size": _rest(keys)}]


def _random(keys: int, length: int) -> Specs:
    return [
        *_around(keys, _SINK, _WINDOW),
        {"type": "RandomSamplingMasker", "sampling_rate": min(1.0, _rest(keys) / length)},
    ]


def _magicpig(keys: int, length: int) -> Specs:
    # As many tables as find so many keys at a right angle, where most keys are.
    one_table = 0.5**_PLANES
    tables = math.log(1 - min(0.99, _rest(keys) / length)) / math.log(1 - one_table)
    sampler = {"type": "MagicPig", "lsh_l": _at_least_one(tables), "lsh_k": _PLANES, "cache_keys": True}
    return [*_around(keys, _SINK, _WINDOW), sampler]


def _vattention(keys: int, length: int) -> Specs:
    sink, window = _around(keys, _SINK, _WINDOW)
    sampler = {
        "type": "AdaptiveSamplingMasker",
        "base_rate_sampling": _at_least_one(_rest(keys) / 2),
        "epsilon": 0.2,
        "delta": 0.2,
        "init_offset": sink["sink_size"],
        "local_offset": window["window_size"],
    }
    return [sink, window, {"type": "OracleTopK", "heavy_size": _at_least_one(_rest(keys) / 2)}, sampler]


DIALS: dict[str, Callable[[int, int], Specs]] = {
    "sink_local": _sink_local,
    "oracle_top_k": _oracle_top_k,
    "hash": _oracle_top_k,
    "magicpig": _magicpig,
    "random": _random,
    "vattention": _vattention,
}


def dial(name: str, density: float, length: int, *, hat_weight_file: str | None = None) -> Specs:
    """Maskers for `build_config`, with which the last query of `length` keys sees about the share `density` of them.

    `magicpig` and `vattention` see as many as their hash tables find and their bound asks for: measure it.

    Args:
        name: sink_local, oracle_top_k, hash, magicpig, random or vattention.
        density: above 0, up to 1, which is no maskers: dense attention.
        hat_weight_file: for `hash`, its projections; `train-hash` makes them.

    Raises:
        ValueError: an unknown name, a density that is none, `hash` without a file.
    """
    if name not in DIALS:
        raise ValueError(f"maskers {name!r} are unknown; valid: {', '.join(DIALS)}, or a file that lists them")
    if not 0 < density <= 1:
        raise ValueError(f"density {density}: it must be above 0 and up to 1")
    if density == 1:
        return []
    keys = max(3, round(density * length))
    specs = DIALS[name](keys, length)
    if name == "hash":
        specs[-1] = {"type": "HashAttentionTopKMasker", **hash_fields(hat_weight_file), "heavy_size": _rest(keys)}
    return specs


def hash_fields(hat_weight_file: str | None) -> dict[str, Any]:
    """The fields of HashAttention that its file of weights answers; ValueError without a file, or for a bad one."""
    from flextok.attention.sparse import load_hat_weights

    if hat_weight_file is None:
        raise ValueError("maskers 'hash' need a file of weights (--hat-weights), which train-hash makes")
    matrices = next(iter(load_hat_weights(hat_weight_file).values()))["query_matrix"]
    return {
        "hat_bits": matrices[-1].shape[2],
        "hat_mlp_layers": len(matrices),
        "hat_mlp_hidden_size": matrices[0].shape[2],
        "hat_mlp_activation": "silu",
        "hat_weight_file": hat_weight_file,
        "cache_keys": True,
    }


def _rest(keys: int) -> int:
    return _at_least_one((1 - _SINK - _WINDOW) * keys)


def _at_least_one(size: float) -> int:
    return max(1, round(size))
