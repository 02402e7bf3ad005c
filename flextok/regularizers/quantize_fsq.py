"""Finite scalar quantization (arXiv 2309.15505): each channel is bounded and rounded to one of a few levels."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from flextok.model.data_dict import RNG_KEY, DataDict, Generators
from flextok.model.draw import draw_uniform, one_generator
from flextok.model.packed_list import PackedList


class FSQ(nn.Module):
    """Quantize latents `[1, n, d]` to codes in [-1, 1] and their ids, d channels with `levels[i]` values each.

    Even level counts are not symmetric: 8 levels give -1 .. 0.75, 2 levels give {-1, 0}. The id is a mixed-radix number
    whose fastest digit is the first channel. Training may leave a share of the samples unrounded (`drop_quant_p`) and,
    with probability `apply_corrupt_tokens_p` per call, replace a share of tokens drawn from
    [`min_corrupt_tokens_p`, `corrupt_tokens_p`] by random codes. `packed_call` is accepted for published configs; entries
    are quantized independently of each other, so there is nothing to choose.
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(
        self,
        latents_read_key: str,
        quants_write_key: str,
        tokens_write_key: str,
        levels: Sequence[int],
        drop_quant_p: float = 0.0,
        corrupt_tokens_p: float = 0.0,
        min_corrupt_tokens_p: float | None = None,
        apply_corrupt_tokens_p: float = 0.2,
        packed_call: bool = True,
    ) -> None:
        super().__init__()
        self.latents_read_key = latents_read_key
        self.quants_write_key = quants_write_key
        self.tokens_write_key = tokens_write_key
        self.levels = [int(level) for level in levels]
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels={self.levels}: every channel needs at least 2 levels")
        if prod(self.levels) > torch.iinfo(torch.int32).max:
            raise ValueError(f"levels={self.levels} give {prod(self.levels)} codes; ids are int32")
        self.drop_quant_p = drop_quant_p
        self.corrupt_tokens_p = corrupt_tokens_p
        # Published configs write 0.0 for "no lower bound of its own".
        self.min_corrupt_tokens_p = min_corrupt_tokens_p or corrupt_tokens_p
        self.apply_corrupt_tokens_p = apply_corrupt_tokens_p
        self.dim = len(self.levels)
        self.codebook_size = prod(self.levels)
        basis = [prod(self.levels[:i]) for i in range(self.dim)]
        self.register_buffer("_levels", torch.tensor(self.levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int32), persistent=False)

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes, `[codebook_size, d]` float32."""
        return self.indices_to_embedding(torch.arange(self.codebook_size, device=self._basis.device))

    def bound(self, z: Tensor, eps: float = 1e-3) -> Tensor:
        """Squash each channel of `[..., d]` into its range of levels."""
        half = (self._levels - 1) * (1 + eps) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).atanh()
        return (z + shift).tanh() * half - offset

    def quantize(self, z: Tensor) -> Tensor:
        """Codes `[..., d]` in [-1, 1]; the gradient passes through the rounding."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self._levels // 2)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Ids `[...]` int32 of codes `[..., d]`."""
        half_width = self._levels // 2
        digits = (codes * half_width + half_width).round().to(torch.int32)
        return (digits * self._basis).sum(-1, dtype=torch.int32)

    def indices_to_embedding(self, indices: Tensor) -> Tensor:
        """Codes `[..., d]` float32 of ids `[...]`."""
        half_width = self._levels // 2
        digits = indices[..., None] // self._basis % self._levels
        return (digits - half_width) / half_width.float()

    def corrupt_quant(self, quant: Tensor, generator: Generators = None) -> Tensor:
        """Replace a random share of the codes `[b, ..., d]` by codes of the book drawn uniformly."""
        positions = quant.shape[:-1]
        low, high = self.min_corrupt_tokens_p, self.corrupt_tokens_p
        share = low + (high - low) * draw_uniform((1,), one_generator(generator), quant.device)
        replaced = draw_uniform(positions, generator, quant.device) < share
        ids = (draw_uniform(positions, generator, quant.device) * self.codebook_size).long()
        return torch.where(replaced[..., None], self.indices_to_embedding(ids), quant)

    def forward_z(self, z: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Codes `[b, ..., d]` float32 and ids `[b, ...]` int64 of latents `[b, ..., d]`; in training with random drops."""
        with torch.autocast(device_type=z.device.type, enabled=False):
            z = z.float()
            quant = self.quantize(z)
            if self.training and self.drop_quant_p > 0.0:
                dropped = draw_uniform((z.shape[0],), generator, z.device) < self.drop_quant_p
                unrounded = self.bound(z) / (self._levels // 2)
                quant = torch.where(dropped.view(-1, *(1,) * (z.ndim - 1)), unrounded, quant)
            if self.training and self.corrupt_tokens_p > 0.0:
                applies = draw_uniform((1,), one_generator(generator), "cpu").item() < self.apply_corrupt_tokens_p
                quant = self.corrupt_quant(quant, generator) if applies else quant
            return quant, self.codes_to_indices(quant).long()

    def forward(self, data_dict: DataDict) -> DataDict:
        latents, generator = data_dict[self.latents_read_key], data_dict.get(RNG_KEY)
        if isinstance(latents, Tensor):
            quants, tokens = self._forward_entry(latents, generator)
            data_dict[self.quants_write_key], data_dict[self.tokens_write_key] = quants, tokens
            return data_dict
        latents = PackedList.pack_if_uniform(latents)
        if isinstance(latents, PackedList) and latents.is_uniform:
            quants, tokens = self._forward_entry(latents.tensor, generator)
            data_dict[self.quants_write_key], data_dict[self.tokens_write_key] = PackedList(quants), PackedList(tokens)
            return data_dict
        per_sample = generator if isinstance(generator, Sequence) else [generator] * len(latents)
        pairs = zip(latents, per_sample, strict=True)
        results = [self._forward_entry(entry, g if g is None else [g]) for entry, g in pairs]
        data_dict[self.quants_write_key] = [quants for quants, _ in results]
        data_dict[self.tokens_write_key] = [tokens for _, tokens in results]
        return data_dict

    def _forward_entry(self, latents: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        """`forward_z`; entries `[b, d, h, w]` are images, channels first."""
        if latents.ndim == 4:
            quants, tokens = self.forward_z(latents.movedim(1, -1), generator)
            return quants.movedim(-1, 1), tokens
        return self.forward_z(latents, generator)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, codebook_size={self.codebook_size}"
