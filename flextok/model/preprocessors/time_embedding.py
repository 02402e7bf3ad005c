"""Sinusoidal time embedding followed by an MLP."""

import math

import torch
from torch import Tensor, nn

from flextok.model.data_dict import DataDict
from flextok.model.init import InitStyle, MuPInit, init_linear
from flextok.model.layers.modulation import per_sample


class TimestepEmbedder(MuPInit):
    """Embed times `[batch]` as `[batch, dim]`, or as a list of `[1, 1, dim]` with `temb_as_tokens`."""

    def __init__(
        self,
        timesteps_read_key: str,
        time_embedding_write_key: str,
        dim: int,
        frequency_embedding_size: int = 256,
        weight_init_style: InitStyle = "xavier",
        max_timestep: float = 1000.0,
        temb_as_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.timesteps_read_key = timesteps_read_key
        self.time_embedding_write_key = time_embedding_write_key
        self.frequency_embedding_size = frequency_embedding_size
        self.max_timestep = max_timestep
        self.temb_as_tokens = temb_as_tokens
        self.weight_init_style = weight_init_style
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, dim), nn.SiLU(), nn.Linear(dim, dim))
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        for linear in (self.mlp[0], self.mlp[2]):
            init_linear(linear, self.weight_init_style, mup=mup)  # type: ignore[arg-type]

    def timestep_embedding(self, t: Tensor, dim: int, max_period: float = 256.0) -> Tensor:
        """`[cos(t f) | sin(t f)]`, `[batch, dim]`, with f_k = 1000 / max_timestep * max_period^(-k / half).

        An odd `dim` ends in 0.

        Raises:
            ValueError: a time exceeds `max_timestep` (checked on the CPU only; elsewhere it would wait for the device).
        """
        if t.device.type == "cpu" and t.numel() and t.max() > self.max_timestep:
            raise ValueError(f"timestep {t.max().item()} exceeds max_timestep={self.max_timestep}")
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        frequencies = 1000.0 / self.max_timestep * torch.exp(-math.log(max_period) * exponents)
        angles = t[:, None].float() * frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return nn.functional.pad(embedding, (0, dim % 2))

    def _embed(self, t: Tensor) -> Tensor:
        """`[batch, 1]` -> `[batch, dim]`."""
        frequencies = self.timestep_embedding(t[:, 0], self.frequency_embedding_size)
        return self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))

    def forward(self, data_dict: DataDict) -> DataDict:
        embedding = per_sample(self._embed, data_dict[self.timesteps_read_key][:, None])
        data_dict[self.time_embedding_write_key] = (
            [row[None] for row in embedding.split(1)] if self.temb_as_tokens else embedding
        )
        return data_dict
