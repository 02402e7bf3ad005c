"""What both yardsticks share: their weights, and the formulas that have no shape of batch in them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.observation import Observation
from benchmarks.workloads import Step
from flextok.flextok_wrapper import FlexTok

Weights = dict[str, Tensor]
TRUNKS = {"enc_transformer": "encoder", "dec_transformer": "decoder"}


class Yardstick(ABC):
    """The weights of a model by their names below `module_dict.`, and what is done with them.

    Args:
        model: in the mask-token form; its weights are copied.
    """

    block: Callable[..., Tensor]
    """`block(weights, x, **context)`: one block of a trunk, which has these weights."""

    def __init__(self, model: FlexTok) -> None:
        self.weights = {
            name.split("module_dict.")[1]: parameter.detach().clone().requires_grad_(parameter.requires_grad)
            for name, parameter in model.named_parameters()
            if "module_dict." in name
        }
        self.levels: list[int] = model.regularizer.levels
        self.patch: int = model.decoder.module_dict["dec_noise_patch_emb"].patch_sizes[0]
        attention = model.encoder.module_dict["enc_transformer"].blocks[0].attn
        self.head_dim: int = attention.wq.out_features // attention.num_heads
        self.blocks = {trunk: self._blocks_of(trunk) for trunk in TRUNKS}
        """Per trunk and block, its weights by their names below the block."""
        self.run_block: Callable[..., Tensor] = self.block
        self.observation = Observation()

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [weight for weight in self.weights.values() if weight.requires_grad]

    def trunk(self, name: str, x: Tensor, **context: Any) -> Tensor:
        """All blocks of a trunk on `[rows, tokens, width]`."""
        self.observation.tokens[TRUNKS[name]] += x.shape[0] * x.shape[1]
        self.observation.backends["sdpa"] += 1
        for weights in self.blocks[name]:
            x = self.run_block(weights, x, **context)
        return x

    @contextmanager
    def observe(self) -> Iterator[Observation]:
        """Yield what is noted about the forwards inside."""
        self.observation = Observation()
        try:
            yield self.observation
        finally:
            self.observation = Observation()

    @abstractmethod
    def velocity(self, step: Step) -> Tensor:
        """The predicted velocity `[batch, channels, h, w]` of a training step."""

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """The mean over samples of the mean squared error of each."""

    @abstractmethod
    def decode(self, quants: Tensor, keep_ks: list[int], noise: Tensor, *, num_steps: int, guidance: float) -> Tensor:
        """Latents `[batch, channels, h, w]` from quants `[batch, registers, levels]`; guidance 1.0 is none."""

    def compile_blocks(self) -> None:
        """Compile the block once for all layers of a trunk."""
        self.run_block = torch.compile(self.block)

    def _blocks_of(self, trunk: str) -> list[Weights]:
        blocks: dict[str, Weights] = {}
        for name, weight in self.weights.items():
            if name.startswith(f"{trunk}.blocks."):
                index, short = name.removeprefix(f"{trunk}.blocks.").split(".", 1)
                blocks.setdefault(index, {})[short] = weight
        return list(blocks.values())

    def heads(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys, and values, each `[batch, heads, tokens, head_dim]`."""
        q, k, v = (linear(weights, f"attn.w{part}", x).unflatten(-1, (-1, self.head_dim)) for part in "qkv")
        q, k = norm(q).to(v.dtype), norm(k).to(v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Merged heads `[batch, tokens, width]`; the scale of muP is 8 / head_dim."""
        out = F.scaled_dot_product_attention(q, k, v, scale=8 / self.head_dim, **options)
        return out.transpose(1, 2).flatten(2)

    def patches(self, part: str, posemb: str, latents: Tensor) -> Tensor:
        """Embedded patches `[batch, patches, width]` of latents `[batch, channels, h, w]`."""
        p, (batch, channels, h, w) = self.patch, latents.shape
        cells = latents.view(batch, channels, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
        table = self.weights[f"{posemb}.posembs"][0, :, : h // p, : w // p].flatten(1).T
        return linear(self.weights, f"{part}.patch_proj", cells.flatten(3).flatten(1, 2)) + table

    def time_embedding(self, times: Tensor) -> Tensor:
        """`[batch, width]` of times `[batch]` in [0, 1]."""
        name = "dec_time_embedder.mlp"
        half = self.weights[f"{name}.0.weight"].shape[1] // 2
        rates = 1000 * torch.exp(-math.log(256) / half * torch.arange(half, device=times.device))
        angles = times[:, None].float() * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return linear(self.weights, f"{name}.2", F.silu(linear(self.weights, f"{name}.0", waves)))

    def quantize(self, latents: Tensor) -> Tensor:
        """Finite scalar quantization in float32, its gradient straight through the rounding."""
        levels = torch.tensor(self.levels, device=latents.device)
        half = (levels - 1) * 1.001 / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = (latents.float() + (offset / half).atanh()).tanh() * half - offset
        return (bounded + (bounded.round() - bounded).detach()) / (levels // 2)

    def latents(self, patches: Tensor, shift: Tensor, scale: Tensor, size: torch.Size) -> Tensor:
        """The head: patches `[batch, patches, width]` to latents of `size` (channels, h, w)."""
        p, (channels, h, w) = self.patch, size
        cells = linear(self.weights, "dec_to_patches.proj", norm(patches) * (1 + scale) + shift)
        return cells.view(-1, h // p, w // p, p, p, channels).permute(0, 5, 1, 3, 2, 4).reshape(-1, *size)


def norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters, computed in float32."""
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def modulation(weights: Weights, embedding: Tensor, prefix: str = "") -> Tensor:
    return linear(weights, f"{prefix}adaLN_modulation.1", F.silu(embedding))


def mlp(weights: Weights, x: Tensor) -> Tensor:
    return linear(weights, "mlp.fc2", F.silu(linear(weights, "mlp.fc1", x)) * linear(weights, "mlp.fc3", x))
