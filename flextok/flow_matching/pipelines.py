"""The rectified-flow sampler over the data dictionary."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from flextok.flow_matching.sampling import GuidanceScale, Samples, Velocity, guided, sample_euler
from flextok.model.data_dict import NULL_CONDITION_KEY, RNG_KEY, DataDict, Generators
from flextok.model.draw import draw_normal, generator_per_sample
from flextok.model.packed_list import PackedList, repeat_batch

DEFAULT_NUM_STEPS = 25
T = TypeVar("T")


class MinRFPipeline:
    """Decode conditions in the dictionary to latents by integrating the model's velocity from noise to data.

    The model reads the current samples under `noised_images_read_key` and the times under `timesteps_read_key`, and
    writes the velocity under `reconst_write_key`. All arguments are public attributes that may be changed later, for
    instance `noise_read_key` to start from given noise.
    """

    def __init__(
        self,
        model: Any,
        noise_read_key: str | None = None,
        target_sizes_read_key: str | None = None,
        latents_read_key: Any = None,
        timesteps_read_key: Any = None,
        noised_images_read_key: Any = None,
        reconst_write_key: Any = None,
        out_channels: Any = None,
    ) -> None:
        self.model = model
        self.noise_read_key = noise_read_key
        self.target_sizes_read_key = target_sizes_read_key
        self.latents_read_key = latents_read_key
        self.timesteps_read_key = timesteps_read_key
        self.noised_images_read_key = noised_images_read_key
        self.reconst_write_key = reconst_write_key
        self.out_channels = out_channels

    def _sizes(self, data_dict: DataDict, sizes: int | Sequence[Sequence[int]] | None) -> list[tuple[int, int]]:
        batch = len(data_dict[self.latents_read_key])
        if isinstance(sizes, int):
            return [(sizes, sizes)] * batch
        if sizes is not None:
            pairs = [tuple(size) for size in sizes if isinstance(size, Sequence) and len(size) == 2]
            if len(pairs) != batch or len(sizes) != batch:
                raise ValueError(
                    f"vae_image_sizes={sizes!r}: valid is one int, or {batch} pairs (h, w), one per sample"
                )
            return [(int(h), int(w)) for h, w in pairs]
        if self.target_sizes_read_key is None:
            raise ValueError("vae_image_sizes=None needs target_sizes_read_key; give the latents' size, or (h, w) each")
        return self._sizes(data_dict, data_dict[self.target_sizes_read_key])

    def _start(self, data_dict: DataDict, sizes: Any, generator: Generators) -> Samples:
        """Noise as one tensor `[batch, c, h, w]` if all sizes agree, else one `[1, c, h, w]` per sample."""
        if self.noise_read_key is not None:
            noise = PackedList.pack_if_uniform(data_dict[self.noise_read_key])
            return [noise.tensor] if isinstance(noise, PackedList) else list(noise)
        shapes = [(1, self.out_channels, *size) for size in self._sizes(data_dict, sizes)]
        # One draw per sample, so that the numbers do not depend on whether the sizes agree.
        pairs = zip(shapes, generator_per_sample(generator, len(shapes)), strict=True)
        samples = [draw_normal(shape, g, self.model.device) for shape, g in pairs]
        return [torch.cat(samples)] if len(set(shapes)) == 1 else samples

    def _predict(self, inputs: DataDict, x: Samples, t: float, *, batch: int) -> Samples:
        """The model's velocity; `x` is one tensor for the batch, or one per sample. `inputs` stays as it is."""
        uniform = x[0].shape[0] == batch
        state = {
            self.noised_images_read_key: PackedList(x[0]) if uniform else x,
            self.timesteps_read_key: torch.full((batch,), t, device=x[0].device),
        }
        velocity = self.model({**inputs, **state})[self.reconst_write_key]
        return [PackedList.pack(velocity).tensor] if uniform else list(velocity)

    def _velocity(self, data_dict: DataDict, batch: int, scale: GuidanceScale, *, apg: bool) -> Velocity:
        if not callable(scale) and scale == 1.0:
            return partial(self._predict, data_dict, batch=batch)
        # Both branches run as one batch of 2 B samples, the conditional ones first.
        doubled = {key: repeat_batch(value, batch, 2) for key, value in data_dict.items()}
        flags = list(data_dict.get(NULL_CONDITION_KEY, [False] * batch))
        doubled[NULL_CONDITION_KEY] = flags + [True] * batch

        def both_branches(x: Samples, t: float) -> tuple[Samples, Samples]:
            if len(x) == batch:
                samples = self._predict(doubled, x + x, t, batch=2 * batch)
                return samples[:batch], samples[batch:]
            (stacked,) = self._predict(doubled, [x[0].repeat(2, 1, 1, 1)], t, batch=2 * batch)
            return [stacked[:batch]], [stacked[batch:]]

        return guided(both_branches, scale, apg=apg)

    @torch.no_grad()
    def __call__(
        self,
        data_dict: DataDict,
        generator: Generators = None,
        timesteps: int | None = None,
        vae_image_sizes: int | Sequence[Sequence[int]] | None = None,
        verbose: bool = True,
        guidance_scale: GuidanceScale = 1.0,
        perform_norm_guidance: bool = False,
    ) -> DataDict:
        """Write the decoded latents, the last times and noised samples into `data_dict`; nothing else changes.

        Args:
            generator: one, or one per sample; None takes the one in the dictionary, else torch's default.
            timesteps: number of Euler steps; None means 25.
            vae_image_sizes: size of the latents: one int, `(h, w)` per sample, or None to read the dictionary.
            guidance_scale: 1.0 turns guidance off; may be a function of time.
            perform_norm_guidance: APG instead of plain classifier-free guidance.
        """
        num_steps = DEFAULT_NUM_STEPS if timesteps is None else timesteps
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"timesteps={timesteps!r}: valid is a number of steps, at least 1, or None for 25")
        if not callable(guidance_scale) and not isinstance(guidance_scale, int | float):
            raise ValueError(f"guidance_scale={guidance_scale!r}: valid is a number, or a function of time")
        x = self._start(data_dict, vae_image_sizes, data_dict.get(RNG_KEY) if generator is None else generator)
        batch = sum(samples.shape[0] for samples in x)
        velocity = self._velocity(data_dict, batch, guidance_scale, apg=perform_norm_guidance)
        states = sample_euler(velocity, x, num_steps)
        for t, last, x in _progress(states, num_steps) if verbose else states:  # noqa: B007
            pass
        data_dict[self.timesteps_read_key] = torch.full((batch,), t, device=x[0].device)
        data_dict[self.noised_images_read_key] = PackedList(last[0]) if len(last) == 1 else last
        data_dict[self.reconst_write_key] = PackedList(x[0]) if len(x) == 1 else x
        return data_dict


def _progress(steps: Iterable[T], total: int) -> Iterable[T]:
    """A progress bar over the steps where tqdm is installed, else none."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=total, desc="decoding", leave=False)
