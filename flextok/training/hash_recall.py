"""How many of the oracle's keys hash projections find; and the table and picture of that."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from flextok.attention.sparse import HashAttentionTopKMasker, HashAttentionTopKMaskerConfig, Mask
from flextok.attention.sparse.hat_weights import HatWeights
from flextok.seeding import mixed_seed
from flextok.training.hash_data import Observed, num_sequences
from flextok.training.hash_module import best_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def recall(observed: Observed, weights: HatWeights, density: float, activation: str = "silu") -> dict[int, float]:
    """By layer, the share of the `density` best keys that are among as many chosen by HashAttention.

    Over all heads, and queries that see more keys than that.
    """
    matrices = next(iter(weights.values()))["query_matrix"]
    found = {}
    for layer, of_layer in observed.items():
        hits = total = 0
        for place in range(num_sequences(observed)):
            is_best, is_pair = best_keys(of_layer, place, density)
            q, k = of_layer.queries[place][None], of_layer.keys[place][None]
            config = HashAttentionTopKMaskerConfig(
                heavy_size=max(1, int(density * k.shape[2])),
                hat_bits=matrices[-1].shape[2],
                hat_mlp_layers=len(matrices),
                hat_mlp_hidden_size=matrices[0].shape[2],
                hat_mlp_activation=activation,
                hat_weights=weights,
            )
            mask = HashAttentionTopKMasker(config).add_mask(
                keys=k,
                queries=q,
                values=k,
                attention_mask=is_pair[None],
                scaling=1.0,
                dropout=0.0,
                sparse_meta_data={},
                previous_mask=Mask.create_empty_mask((*q.shape[:3], k.shape[2]), torch.float32, q.device),
                layer_idx=layer,
            )
            hits += int((is_best & (mask.get_dense_mask()[0] > 0)).sum())
            total += int(is_best.sum())
        found[layer] = hits / total if total else float("nan")
    return found


def random_projections(observed: Observed, bits: int, seed: int) -> HatWeights:
    """Untrained hyperplanes, the same for queries and keys."""
    weights: HatWeights = {}
    for layer, of_layer in observed.items():
        heads, _, width = of_layer.queries[0].shape
        generator = torch.Generator().manual_seed(mixed_seed(seed, "random projections", layer, bits))
        matrix, bias = torch.randn(heads, width, bits, generator=generator), torch.zeros(heads, bits)
        weights[layer] = {f"{side}_matrix": [matrix] for side in ("query", "key")}
        weights[layer] |= {f"{side}_bias": [bias] for side in ("query", "key")}
    return weights


def format_recall(report: Mapping[str, Any]) -> str:
    """Lines for people: a row per number of bits and density; guessing finds the density itself."""
    lines = ["bits  density  learned  random"]
    for row in report["results"]:
        lines.append(f"{row['bits']:4d}  {row['density']:7.2f}  {row['learned']:7.3f}  {row['random']:6.3f}")
    return "\n".join(lines)


def draw_recall(report: Mapping[str, Any]) -> "Figure":
    """Recall over density: a colour per number of bits, dashed for random projections."""
    from flextok.evaluation.plot import BOUND, COLOURS, panels

    figure, (axes,) = panels(1)
    for colour, bits in zip(COLOURS, sorted({row["bits"] for row in report["results"]}), strict=False):
        rows = [row for row in report["results"] if row["bits"] == bits]
        densities = [row["density"] for row in rows]
        for name, style in (("learned", "-"), ("random", "--")):
            label = f"{bits} bits, {name}"
            values = [row[name] for row in rows]
            axes.plot(densities, values, marker="o", markersize=4, linestyle=style, color=colour, label=label)
    axes.plot([0, max(densities)], [0, max(densities)], linestyle=":", linewidth=1, color=BOUND, label="guessing")
    axes.set_xlabel("density: share of the keys that is chosen")
    axes.set_ylabel("share of the oracle's keys among them")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    return figure
