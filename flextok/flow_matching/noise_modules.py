"""Noising of latents for training."""

import torch
from torch import Tensor, nn

from flextok.flow_matching.path import interpolate, mode_times, shift_times, stratified_normal
from flextok.model.data_dict import RNG_KEY, DataDict, Generators
from flextok.model.draw import draw_normal, draw_uniform, generator_per_sample
from flextok.model.packed_list import PackedList


class MinRFNoiseModule(nn.Module):
    """Move each sample to a random time of its path to noise.

    Times are logit-normal with `ln` (one per stratum of the batch with `stratisfied`), else uniform or, with
    `mode_scale`, mode-distributed; `timestep_shift` (ours, not in published configs) then moves them. The noise is read
    from `noise_read_key` or drawn. Writes the noised samples, the noise, and the times `[batch]` under two keys.
    """

    def __init__(
        self,
        clean_images_read_key: str,
        noised_images_write_key: str,
        timesteps_write_key: str,
        sigmas_write_key: str,
        ln: bool = True,
        stratisfied: bool = False,
        mode_scale: float = 0.0,
        noise_write_key: str = "flow_noise",
        noise_read_key: str | None = None,
        timestep_shift: float = 1.0,
    ) -> None:
        super().__init__()
        self.clean_images_read_key = clean_images_read_key
        self.noised_images_write_key = noised_images_write_key
        self.timesteps_write_key = timesteps_write_key
        self.sigmas_write_key = sigmas_write_key
        self.ln = ln
        self.stratisfied = stratisfied
        self.mode_scale = mode_scale
        self.noise_write_key = noise_write_key
        self.noise_read_key = noise_read_key
        if timestep_shift <= 0:
            raise ValueError(f"timestep_shift={timestep_shift} must be positive; 1 leaves the times alone")
        self.timestep_shift = timestep_shift

    def _draw_times(self, batch: int, generator: Generators) -> Tensor:
        """`[batch]`, on the CPU."""
        return shift_times(self._draw_unshifted_times(batch, generator), self.timestep_shift)

    def _draw_unshifted_times(self, batch: int, generator: Generators) -> Tensor:
        if not self.ln:
            return mode_times(draw_uniform((batch,), generator, "cpu"), self.mode_scale)
        if self.stratisfied:
            return stratified_normal(draw_uniform((batch,), generator, "cpu")).sigmoid()
        return draw_normal((batch,), generator, "cpu").sigmoid()

    def _noise(self, clean: PackedList | list[Tensor], data_dict: DataDict) -> PackedList | list[Tensor]:
        if self.noise_read_key is not None:
            noise = data_dict[self.noise_read_key]
            return PackedList.pack(noise) if isinstance(clean, PackedList) else noise
        generator = data_dict.get(RNG_KEY)
        if isinstance(clean, PackedList):
            x = clean.tensor
            return PackedList(draw_normal(x.shape, generator, x.device, x.dtype))
        pairs = zip(clean, generator_per_sample(generator, len(clean)), strict=True)
        return [draw_normal(x.shape, g, x.device, x.dtype) for x, g in pairs]

    def forward(self, data_dict: DataDict) -> DataDict:
        clean = PackedList.pack_if_uniform(data_dict[self.clean_images_read_key])
        clean = clean if isinstance(clean, PackedList) else list(clean)
        noise = self._noise(clean, data_dict)
        device = clean[0].device
        times = self._draw_times(len(clean), data_dict.get(RNG_KEY)).to(device, non_blocking=True)
        if isinstance(clean, PackedList) and isinstance(noise, PackedList):
            data_dict[self.noised_images_write_key] = PackedList(interpolate(clean.tensor, noise.tensor, times))
        else:
            triples = zip(clean, noise, torch.unbind(times[:, None]), strict=True)
            data_dict[self.noised_images_write_key] = [interpolate(x, n, t) for x, n, t in triples]
        data_dict[self.noise_write_key] = noise
        data_dict[self.sigmas_write_key] = times
        data_dict[self.timesteps_write_key] = times
        return data_dict
