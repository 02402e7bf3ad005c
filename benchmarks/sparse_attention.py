"""Where does sparse attention save time, and where not? `python -m benchmarks.sparse_attention`

Three questions, each beside dense attention (`scaled_dot_product_attention`) in the same run, and each checked against
the dense result under the same mask before anything is timed:

- windows: sink and centred band over a long row, where whole tiles are left out;
- decoding: one query over many keys, of which a share is gathered, for several shapes of heads; `attend` is given the
  columns, `select_and_attend` also chooses them;
- selection: choosing keys by cached signatures, against the dense attention that it is to replace.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command import parse, parser, write
from benchmarks.harness import measure_in_turn, median_ratio, print_table
from flextok.attention.engine import attend
from flextok.attention.sparse import (
    MaskerConfig,
    ResearchAttention,
    Selection,
    build_config,
    gathered_attention,
    geometric_block_mask,
    windowed_attention,
)

Specs = list[dict[str, Any]]
Ways = dict[str, Callable[[], object]]
HEAD_DIM = 64
BANDS = (64, 128, 256, 512)
"""Keys on either side of a query."""
SHAPES = ((8, 8, 64), (32, 8, 128), (8, 2, 64))
"""Heads of queries, heads of keys, size of a head."""
DENSITIES = (0.02, 0.05, 0.1, 0.25)
SHARE = 0.05
"""Keys that the selectors are asked for."""


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("sparse_attention", __doc__, repeats=15)
    command.add_argument("--row", type=int, default=4_096, help="tokens of the row with a window")
    command.add_argument("--keys", type=int, default=32_768, help="keys of a decoding step")
    options = parse(command, arguments)
    device: torch.device = options.device
    torch.manual_seed(0)
    with torch.no_grad():
        windows = [*measure_windows(options.row, options.repeats, device)]
        print_table(windows)
        decoding = [*measure_decoding(options.keys, options.repeats, device)]
        print_table(decoding)
        selection = [*measure_selection(options.keys, options.repeats, device)]
        print_table(selection)
    sizes = {"row": options.row, "keys": options.keys}
    write(options, {**sizes, "windows": windows, "decoding": decoding, "selection": selection})


def measure_windows(length: int, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Centred bands of several widths, 8 heads of 64."""
    q, k, v = (torch.randn(1, 8, length, HEAD_DIM, device=device) for _ in range(3))
    scale = HEAD_DIM**-0.5
    for band in (band for band in BANDS if 2 * band < length):
        specs: Specs = [{"type": "LocalMasker", "window_size": band, "mode": "centered"}]
        configs = build_config(specs).masker_configs
        sparse = window_on(device, q, k, v, configs, scale)
        place = torch.arange(length, device=device)
        mask = (place[:, None] - place).abs() <= band
        check(sparse(), F.scaled_dot_product_attention(q, k, v, mask, scale=scale), f"band {band}")
        ways: Ways = {"dense": partial(F.scaled_dot_product_attention, q, k, v, scale=scale), "sparse": sparse}
        row = {"band": band, "density": float(mask.float().mean())}
        yield row | times_and_ratio(ways, repeats, device)


def window_on(
    device: torch.device, q: Tensor, k: Tensor, v: Tensor, configs: Sequence[MaskerConfig], scale: float
) -> Callable[[], Tensor]:
    """Attention `(B, H, Sq, D)` under geometric maskers, as it is done on the device."""
    if device.type == "cuda":
        blocks = geometric_block_mask(configs, q.shape[2], k.shape[2], device=device)
        return partial(attend, q, k, v, blocks, scale=scale, backend="flex")
    return lambda: windowed_attention(q, k, v, configs, scale).transpose(1, 2)


def measure_decoding(num_keys: int, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """One query, keys gathered by columns: drawn ones at several densities."""
    for heads, key_heads, width in SHAPES:
        q, k, v = one_query(heads, key_heads, width, num_keys, device)
        scale = width**-0.5
        dense = partial(F.scaled_dot_product_attention, q, k, v, scale=scale, enable_gqa=heads != key_heads)
        for density in DENSITIES:
            columns = (
                torch.rand(1, heads, 1, num_keys, device=device).topk(int(density * num_keys)).indices.sort().values
            )
            chosen = Selection(columns, torch.ones(columns.shape, device=device))
            mask = torch.zeros(1, heads, 1, num_keys, dtype=torch.bool, device=device).scatter_(-1, columns, True)
            gathered = partial(gathered_attention, q, k, v, chosen, scale)
            expected = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=heads != key_heads)
            check(gathered().transpose(1, 2), expected, f"{heads}:{key_heads} heads of {width}, density {density}")
            row = {"heads": heads, "key_heads": key_heads, "head_dim": width, "density": density}
            yield row | times_and_ratio({"dense": dense, "sparse": gathered}, repeats, device)


def measure_selection(num_keys: int, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Choosing by cached signatures, and choosing and attending, for the first of the shapes."""
    for heads, key_heads, width in SHAPES:
        q, k, v = one_query(heads, key_heads, width, num_keys, device)
        scale = width**-0.5
        dense = partial(F.scaled_dot_product_attention, q, k, v, scale=scale, enable_gqa=heads != key_heads)
        for name, masker in selectors(heads, width, device).items():
            attention, state = ResearchAttention.create_from_config(build_config([masker])), {}  # type: ignore[var-annotated]
            select = partial(attention.select, q, k, None, state, layer_idx=0)
            both = partial(attention.gathered_attention, q, k, v, None, scale, state, layer_idx=0)
            chosen = select()
            expected, _ = attention.custom_attention(None, q, k, v, None, scale, 0.0, state, layer_idx=0)
            check(both(), expected, name)
            ways: Ways = {"dense": dense, "select": select, "select_and_attend": both}
            seconds = measure_in_turn(ways, repeats=repeats, warmup=3, device=device)
            yield {
                "selector": name,
                "heads": heads,
                "key_heads": key_heads,
                "head_dim": width,
                "density": float((chosen.probabilities > 0).float().sum(-1).mean()) / num_keys,
                "dense_ms": 1e3 * middle(seconds["dense"]),
                "select_ms": 1e3 * middle(seconds["select"]),
                "select_over_dense": median_ratio(seconds["select"], seconds["dense"]),
                "select_and_attend_over_dense": median_ratio(seconds["select_and_attend"], seconds["dense"]),
            }


def selectors(heads: int, width: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Maskers that keep signatures of keys: 32 learned bits, here of one random matrix; 8 tables of 8 random bits."""
    parts = {
        f"{side}_{kind}": [torch.randn(heads, *shape, device=device)]
        for side in ("query", "key")
        for kind, shape in (("matrix", (width, 32)), ("bias", (32,)))
    }
    hash_attention = {
        "type": "HashAttentionTopKMasker",
        "heavy_size": SHARE,
        "hat_bits": 32,
        "hat_mlp_layers": 1,
        "hat_mlp_hidden_size": 32,
        "hat_mlp_activation": "relu",
        "hat_weights": {0: parts},
        "cache_keys": True,
    }
    return {"hash": hash_attention, "magicpig": {"type": "MagicPig", "lsh_l": 8, "lsh_k": 8, "cache_keys": True}}


def one_query(
    heads: int, key_heads: int, width: int, num_keys: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, heads, 1, width, device=device)
    k, v = (torch.randn(1, key_heads, num_keys, width, device=device) for _ in range(2))
    return q, k, v


def check(found: Tensor, expected: Tensor, what: str) -> None:
    """AssertionError unless the two agree to rounding."""
    difference = float((found - expected).abs().max())
    if difference > 1e-4:
        raise AssertionError(f"{what}: the sparse result differs from the dense one by {difference}")


def times_and_ratio(ways: Ways, repeats: int, device: torch.device) -> dict[str, float]:
    seconds = measure_in_turn(ways, repeats=repeats, warmup=3, device=device)
    milliseconds = {f"{name}_ms": 1e3 * middle(of_way) for name, of_way in seconds.items()}
    return {**milliseconds, "times_faster": median_ratio(seconds["dense"], seconds["sparse"])}


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
