"""Random calls of attention: grouped heads, one query, odd lengths, rows without keys, half types."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from flextok.attention.sparse import Mask


class Problem(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    attention_mask: Tensor | None
    generator: torch.Generator

    @property
    def shape(self):
        return (*self.q.shape[:3], self.k.shape[2])

    def random_mask(self, density=0.4):
        """Values from 0 to 1: none in some rows, all in others, fractions in between."""
        noise = torch.rand(self.shape, generator=self.generator)
        values = torch.where(noise < density, torch.rand(self.shape, generator=self.generator) + 0.05, 0).clamp(max=1)
        kind = torch.randint(0, 4, (*self.shape[:3], 1), generator=self.generator)
        values = torch.where(kind == 0, 0, torch.where(kind == 1, (values > 0).float(), values))
        return Mask.create_mask_from_dense_mask(self.shape, values, torch.float32)

    def arguments(self, **others):
        return {
            "queries": self.q,
            "keys": self.k,
            "values": self.v,
            "attention_mask": self.attention_mask,
            "scaling": 0.4,
            "dropout": 0.0,
            "sparse_meta_data": {},
        } | others


@st.composite
def problems(draw, dtypes=(torch.float32, torch.bfloat16), kinds=("none", "bool", "float"), longest=33):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    num_queries = draw(st.sampled_from([1, 1, 2, 5, 8, 13]))
    num_keys = draw(st.integers(1, longest))
    dtype = draw(st.sampled_from(dtypes))

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q = noise(batch, kv_heads * groups, num_queries, 8)
    k, v = noise(batch, kv_heads, num_keys, 8), noise(batch, kv_heads, num_keys, 6)
    kind = draw(st.sampled_from(kinds))
    attention_mask = None
    if kind != "none":
        # Sometimes wider than there are keys, as a static cache has it.
        size = (draw(st.sampled_from([1, batch])), 1, num_queries, num_keys + draw(st.integers(0, 3)))
        allowed = torch.rand(size, generator=generator) < 0.7
        lowest = draw(st.sampled_from([torch.finfo(torch.float32).min, float("-inf")]))
        bias = torch.randn(size, generator=generator)
        attention_mask = allowed if kind == "bool" else bias.masked_fill(~allowed, lowest)
    return Problem(q, k, v, attention_mask, generator)


def hash_weights(heads, bits=32, width=8, layers=(0,), seed=0):
    """Random perceptrons of two matrices."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    def side(name):
        return {f"{name}_matrix": [noise(heads, 8, width), noise(heads, width, bits)]} | {
            f"{name}_bias": [noise(heads, width), noise(heads, bits)]
        }

    return {layer: side("query") | side("key") for layer in layers}


def specs(heads):
    """One of each masker, by name, for `heads` query heads of width 8."""
    hash_spec = {
        "type": "HashAttentionTopKMasker",
        "heavy_size": 3,
        "hat_bits": 32,
        "hat_mlp_layers": 2,
        "hat_mlp_hidden_size": 8,
        "hat_mlp_activation": "silu",
        "hat_weights": hash_weights(heads),
    }
    adaptive = {"base_rate_sampling": 3, "epsilon": 0.3, "delta": 0.2, "init_offset": 1, "local_offset": 1}
    return {
        "sink": {"type": "SinkMasker", "sink_size": 2},
        "trailing": {"type": "LocalMasker", "window_size": 3},
        "window": {"type": "LocalMasker", "window_size": 0.2, "dense_when_short": False},
        "centered": {"type": "LocalMasker", "window_size": 2, "mode": "centered"},
        "causal": {"type": "CausalMasker"},
        "top_k": {"type": "OracleTopK", "heavy_size": 4},
        "top_p": {"type": "OracleTopPMasker", "top_p": 0.6},
        "hash": hash_spec,
        "random": {"type": "RandomSamplingMasker", "sampling_rate": 0.3},
        "magic_pig": {"type": "MagicPig", "lsh_l": 5, "lsh_k": 2},
        "adaptive": {"type": "AdaptiveSamplingMasker"} | adaptive,
    }
