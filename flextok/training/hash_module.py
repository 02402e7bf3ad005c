"""The perceptrons of HashAttention under training: their signs are to agree for queries and their best keys."""

import math
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from flextok.attention.sparse.hash_attention import ACTIVATIONS
from flextok.attention.sparse.hat_weights import PARTS, HatWeights
from flextok.attention.sparse.scores import repeat_heads
from flextok.seeding import mixed_seed
from flextok.training.hash_data import LayerQueries, Observed, num_sequences
from flextok.training.hash_settings import HashSettings


class HashModule(LightningModule):
    """Learns, per layer and query head, a perceptron for queries and one for keys.

    tanh stands for the sign. The product of two signatures, with a scale and an offset of each head, is the logit of
    whether the key is among the query's best; those few weigh as much as all others together.
    """

    def __init__(self, observed: Observed, bits: int, settings: HashSettings) -> None:
        super().__init__()
        self.settings, self.bits, self._observed = settings, bits, observed
        self.perceptrons = nn.ParameterDict()
        for layer, of_layer in observed.items():
            heads, _, width = of_layer.queries[0].shape
            for name, tensor in _first_weights(layer, heads, width, bits, settings).items():
                self.perceptrons[f"{layer}_{name}"] = nn.Parameter(tensor)
            self.perceptrons[f"{layer}_scale"] = nn.Parameter(torch.full((heads, 1, 1), 4.0))
            self.perceptrons[f"{layer}_offset"] = nn.Parameter(torch.zeros(heads, 1, 1))

    def weights(self) -> HatWeights:
        """As `save_hat_weights` takes them."""
        indices = range(self.settings.mlp_layers)
        return {
            layer: {part: [self.perceptrons[f"{layer}_{part}_{i}"].detach().cpu() for i in indices] for part in PARTS}
            for layer in self._observed
        }

    def soft_signature(self, side: str, layer: int, x: Tensor) -> Tensor:
        """`[heads, tokens, bits]` in (-1, 1) of x `[heads, tokens, head_dim]`."""
        for i in range(self.settings.mlp_layers):
            x = x @ self.perceptrons[f"{layer}_{side}_matrix_{i}"]
            x = x + self.perceptrons[f"{layer}_{side}_bias_{i}"][:, None]
            if i < self.settings.mlp_layers - 1:
                x = ACTIVATIONS[self.settings.activation](x)
        return x.tanh()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # By the number of the step, so that a training which goes on sees what it would have seen.
        generator = torch.Generator().manual_seed(mixed_seed(self.settings.seed, "hash", self.global_step))
        places = torch.randint(num_sequences(self._observed), (self.settings.batch_size,), generator=generator)
        losses = [self.loss_of(layer, place) for layer in self._observed for place in places.tolist()]
        loss = torch.stack(losses).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def loss_of(self, layer: int, place: int) -> Tensor:
        """Of one sequence in one layer."""
        of_layer = self._observed[layer]
        queries = of_layer.queries[place].to(self.device)
        keys = repeat_heads(of_layer.keys[place].to(self.device)[None], len(queries))[0]
        is_best, is_pair = best_keys(of_layer, place, self.settings.target)
        is_best, is_pair = is_best.to(self.device), is_pair.to(self.device).expand(is_best.shape)
        product = self.soft_signature("query", layer, queries) @ self.soft_signature("key", layer, keys).mT
        scale, offset = self.perceptrons[f"{layer}_scale"], self.perceptrons[f"{layer}_offset"]
        logits = product / math.sqrt(self.bits) * scale + offset
        positive = is_best.sum() / is_pair.sum()
        weights = torch.where(is_best, 0.5 / positive, 0.5 / (1 - positive)).where(is_pair, 0)
        return binary_cross_entropy_with_logits(logits, is_best.float(), weights, reduction="sum") / is_pair.sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.settings.lr)
        steps = self.settings.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def best_keys(of_layer: LayerQueries, place: int, share: float) -> tuple[Tensor, Tensor]:
    """The keys of the largest logits, so many as `share` of all tokens, bool `[heads, tokens, tokens]`, and the pairs
    that count: those that may attend, of queries that see more keys than that, bool `[1, tokens, tokens]`."""
    queries, keys, allowed = of_layer.queries[place], of_layer.keys[place], of_layer.allowed[place]
    logits = queries @ repeat_heads(keys[None], len(queries))[0].mT
    if allowed is None:
        allowed = torch.ones(logits.shape[1:], dtype=torch.bool)
    count = max(1, int(share * logits.shape[2]))
    best = logits.masked_fill(~allowed, float("-inf")).topk(count).indices
    is_pair = allowed & (allowed.sum(-1, keepdim=True) > count)
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True) & is_pair, is_pair[None]


def _first_weights(layer: int, heads: int, width: int, bits: int, settings: HashSettings) -> dict[str, Tensor]:
    """Random, the same for queries and keys: as with random hyperplanes, what is alike agrees from the beginning."""
    generator = torch.Generator().manual_seed(mixed_seed(settings.seed, "hash weights", layer, bits))
    widths = [width, *[settings.hidden] * (settings.mlp_layers - 1), bits]
    weights: dict[str, Tensor] = {}
    for i, (d_in, d_out) in enumerate(zip(widths, widths[1:], strict=False)):
        matrix = torch.randn(heads, d_in, d_out, generator=generator) / math.sqrt(d_in)
        for side in ("query", "key"):
            weights |= {f"{side}_matrix_{i}": matrix.clone(), f"{side}_bias_{i}": torch.zeros(heads, d_out)}
    return weights
