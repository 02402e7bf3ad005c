"""Finite scalar quantization (arXiv 2309.15505): each channel is bounded and rounded to one of a few levels."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from flextok.model.data_dict import RNG_KEY, DataDict, Generators
from flextok.model.draw import draw_uniform, generator_per_sample, one_generator
from flextok.model.packed_list import PackedList
from flextok.utils.misc import get_autocast_context


class FSQ(nn.Module):
    """Quantize latents `[1, n, d]` to codes in [-1, 1] and their ids, d channels with `levels[i]` values each.

    Even level counts are not symmetric: 8 levels give -1 .. 0.75, 2 levels give {-1, 0}. The id is a mixed-radix number
    whose fastest digit is the first channel. Training may leave a share of the samples unrounded (`drop_quant_p`) and,
    with probability `apply_corrupt_tokens_p` per call, replace a share of tokens drawn from
    [`min_corrupt_tokens_p`, `corrupt_tokens_p`] by random codes. `packed_call` is accepted for published configs;
    entries are quantized independently of each other, so there is nothing to choose.
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
        return self._corrupt(PackedList(quant), generator)

    def forward_z(self, z: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Codes `[b, ..., d]` float32 and ids `[b, ...]` int64 of latents `[b, ..., d]`; random drops in training."""
        quants = self._quantize_samples(PackedList(z), generator).tensor
        return quants, self.codes_to_indices(quants).long()

    def forward(self, data_dict: DataDict) -> DataDict:
        latents, generator = data_dict[self.latents_read_key], data_dict.get(RNG_KEY)
        if isinstance(latents, Tensor):
            # Images come channels first.
            quants, tokens = self.forward_z(latents.movedim(1, -1) if latents.ndim == 4 else latents, generator)
            data_dict[self.quants_write_key] = quants.movedim(-1, 1) if latents.ndim == 4 else quants
            data_dict[self.tokens_write_key] = tokens
            return data_dict
        are_images = latents[0].ndim == 4
        packed = PackedList.pack([entry.movedim(1, -1) for entry in latents] if are_images else latents)
        codes = self._quantize_samples(packed, generator)
        data_dict[self.quants_write_key] = [entry.movedim(-1, 1) for entry in codes] if are_images else codes
        ids = self.codes_to_indices(codes.tensor).long()
        if codes.is_uniform:
            data_dict[self.tokens_write_key] = PackedList(ids)
        else:
            parts = zip(ids.split(codes.num_tokens), codes.shapes, strict=True)
            data_dict[self.tokens_write_key] = [part.view(shape[:-1]) for part, shape in parts]
        return data_dict

    def _quantize_samples(self, latents: PackedList, generator: Generators) -> PackedList:
        """The codes of all samples, float32; what training drops or corrupts is drawn for each sample."""
        with get_autocast_context(latents.tensor, "fp32"):
            latents = latents.map(Tensor.float)
            codes = latents.map(self.quantize)
            if self.training and self.drop_quant_p > 0.0:
                dropped = draw_uniform((len(latents), 1), generator, codes.tensor.device) < self.drop_quant_p
                unrounded = self.bound(latents.tensor) / (self._levels // 2)
                codes = codes.map(lambda x: torch.where(latents.repeat_rows(dropped), unrounded, x))
            if self.training and self.corrupt_tokens_p > 0.0:
                applies = draw_uniform((1,), one_generator(generator), "cpu").item() < self.apply_corrupt_tokens_p
                codes = codes.map(lambda x: self._corrupt(codes, generator)) if applies else codes
            return codes

    def _corrupt(self, codes: PackedList, generator: Generators) -> Tensor:
        device = codes.tensor.device
        low, high = self.min_corrupt_tokens_p, self.corrupt_tokens_p
        share = low + (high - low) * draw_uniform((1,), one_generator(generator), device)
        if codes.is_uniform:
            draws = draw_uniform((*codes.tensor.shape[:-1], 2), generator, device)
        else:
            pairs = zip(codes.num_tokens, generator_per_sample(generator, len(codes)), strict=True)
            draws = torch.cat([draw_uniform((1, n, 2), g, device)[0] for n, g in pairs])
        random_codes = self.indices_to_embedding((draws[..., 1] * self.codebook_size).long())
        return torch.where(draws[..., :1] < share, random_codes, codes.tensor)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, codebook_size={self.codebook_size}"
