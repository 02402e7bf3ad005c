"""The rectified-flow sampler over the data dictionary."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch

from flextok.flow_matching.path import time_grid
from flextok.flow_matching.repeated_model import RepeatedModel
from flextok.flow_matching.sampling import (
    SAMPLERS,
    GuidanceScale,
    Samples,
    Velocity,
    check_sampling,
    guided,
    reuse_difference,
    scale_within,
)
from flextok.model.data_dict import NULL_CONDITION_KEY, RNG_KEY, DataDict, Generators
from flextok.model.draw import draw_normal, generator_per_sample
from flextok.model.packed_list import PackedList, repeat_batch
from flextok.model.trajectory import TRAJECTORY_KEY, Trajectory

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

    def _repeated(self, inputs: DataDict) -> RepeatedModel:
        varying = (self.noised_images_read_key, self.timesteps_read_key)
        return RepeatedModel(self.model, inputs, varying=varying, wanted=self.reconst_write_key)

    def _predict(self, model: RepeatedModel, x: Samples, t: float, trajectory: Trajectory, *, batch: int) -> Samples:
        """The model's velocity; `x` is one tensor for the batch, or one per sample."""
        uniform = x[0].shape[0] == batch
        velocity = model(
            {
                self.noised_images_read_key: PackedList(x[0]) if uniform else x,
                # One time in memory: what is computed of it is computed once for the batch.
                self.timesteps_read_key: torch.full((1,), t, device=x[0].device).expand(batch),
                TRAJECTORY_KEY: trajectory,
            }
        )[self.reconst_write_key]
        trajectory.evaluation += 1
        return [PackedList.pack(velocity).tensor] if uniform else list(velocity)

    def _velocity(
        self,
        data_dict: DataDict,
        batch: int,
        scale: GuidanceScale,
        trajectory: Trajectory,
        *,
        apg: bool,
        interval: Sequence[float],
        every: int,
    ) -> Velocity:
        @cache
        def conditional_model() -> RepeatedModel:
            return self._repeated(data_dict)

        @cache
        def both_models() -> RepeatedModel:
            # Both branches run as one batch of 2 B samples, the conditional ones first.
            doubled = {key: repeat_batch(value, batch, 2) for key, value in data_dict.items()}
            flags = list(data_dict.get(NULL_CONDITION_KEY, [False] * batch))
            return self._repeated({**doubled, NULL_CONDITION_KEY: flags + [True] * batch})

        def conditional(x: Samples, t: float) -> Samples:
            return self._predict(conditional_model(), x, t, trajectory, batch=batch)

        def both_branches(x: Samples, t: float) -> tuple[Samples, Samples]:
            if len(x) == batch:
                samples = self._predict(both_models(), x + x, t, trajectory, batch=2 * batch)
                return samples[:batch], samples[batch:]
            doubled = [x[0].repeat(2, 1, 1, 1)]
            (stacked,) = self._predict(both_models(), doubled, t, trajectory, batch=2 * batch)
            return [stacked[:batch]], [stacked[batch:]]

        if not callable(scale) and scale == 1.0:
            return conditional
        pair = reuse_difference(conditional, both_branches, every)
        return guided(conditional, pair, scale_within(scale, interval), apg=apg)

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
        *,
        sampler: str = "euler",
        timestep_shift: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_every: int = 1,
    ) -> DataDict:
        """Write the decoded latents, the last times and noised samples into `data_dict`; nothing else changes.

        Args:
            generator: one, or one per sample; None takes the one in the dictionary, else torch's default.
            timesteps: number of steps; None means 25.
            vae_image_sizes: size of the latents: one int, `(h, w)` per sample, or None to read the dictionary.
            guidance_scale: 1.0 turns guidance off; may be a function of time.
            perform_norm_guidance: APG instead of plain classifier-free guidance.
            sampler: `euler` evaluates the model once per step; `heun` twice, but once in the last, and is of second
                order (arXiv 2206.00364).
            timestep_shift: above 1 takes shorter steps close to noise, below 1 close to data (arXiv 2403.03206).
            guidance_interval: the first and last time, from 0 (data) to 1 (noise), between which guidance is on
                (arXiv 2404.07724); elsewhere, and where a function gives scale 1, only the conditional half runs.
            guidance_every: the unconditional half runs in every n-th guided evaluation; in between its last
                difference to the conditional one is used again.

        Raises:
            ValueError: an option is not valid; the message names it, its value and what is valid.
        """
        num_steps = DEFAULT_NUM_STEPS if timesteps is None else timesteps
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"timesteps={timesteps!r}: valid is a number of steps, at least 1, or None for 25")
        if not callable(guidance_scale) and not isinstance(guidance_scale, int | float):
            raise ValueError(f"guidance_scale={guidance_scale!r}: valid is a number, or a function of time")
        check_sampling(
            sampler=sampler,
            timestep_shift=timestep_shift,
            guidance_interval=guidance_interval,
            guidance_every=guidance_every,
        )
        generator = data_dict.get(RNG_KEY) if generator is None else generator
        x = self._start(data_dict, vae_image_sizes, generator)
        batch = sum(samples.shape[0] for samples in x)
        trajectory = Trajectory(num_steps, generator)
        velocity = self._velocity(
            data_dict,
            batch,
            guidance_scale,
            trajectory,
            apg=perform_norm_guidance,
            interval=guidance_interval,
            every=guidance_every,
        )
        states = SAMPLERS[sampler](velocity, x, time_grid(num_steps, timestep_shift))
        for t, last, x in _progress(states, num_steps) if verbose else states:  # noqa: B007
            trajectory.step += 1
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
