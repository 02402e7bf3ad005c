"""The rectified-flow sampler over the data dictionary."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok.flow_matching.sampling import GuidanceScale, Samples, guided, sample_euler
from flextok.model.data_dict import NULL_CONDITION_KEY, RNG_KEY, DataDict, Generators
from flextok.model.draw import draw_normal
from flextok.model.packed_list import PackedList, repeat_batch

DEFAULT_NUM_STEPS = 25


class MinRFPipeline:
    """Decode conditions in the dictionary to latents by integrating the model's velocity from noise to data.

    The model reads the current samples under `noised_images_read_key` and the times under `timesteps_read_key`, and writes
    the velocity under `reconst_write_key`. All arguments are public attributes that may be changed later, for instance
    `noise_read_key` to start from given noise.
    """

    def __init__(
        self,
        model: Any,
        noise_read_key: str | None = None,
        target_sizes_read_key: str | None = None,
        latents_read_key: str | None = None,
        timesteps_read_key: str | None = None,
        noised_images_read_key: str | None = None,
        reconst_write_key: str | None = None,
        out_channels: int | None = None,
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
        if isinstance(sizes, int):
            return [(sizes, sizes)] * len(data_dict[self.latents_read_key])
        if sizes is None:
            if self.target_sizes_read_key is None:
                raise ValueError("vae_image_sizes=None needs target_sizes_read_key; give the latents' size, or (h, w) each")
            sizes = data_dict[self.target_sizes_read_key]
        return [(int(h), int(w)) for h, w in sizes]

    def _start(self, data_dict: DataDict, sizes: list[tuple[int, int]] | None, generator: Generators) -> Samples:
        """Noise as one tensor `[batch, c, h, w]` if all sizes agree, else one `[1, c, h, w]` per sample."""
        if sizes is None:
            noise = PackedList.pack_if_uniform(data_dict[self.noise_read_key])
            return [noise.tensor] if isinstance(noise, PackedList) else list(noise)
        device = self.model.device
        if isinstance(generator, torch.Generator) or generator is None:
            # One draw per sample: the numbers do not depend on whether the sizes agree.
            samples = [draw_normal((1, self.out_channels, *size), generator, device) for size in sizes]
        else:
            if len(generator) != len(sizes):
                raise ValueError(f"{len(generator)} generators for a batch of {len(sizes)}")
            pairs = zip(sizes, generator, strict=True)
            samples = [draw_normal((1, self.out_channels, *size), [g], device) for size, g in pairs]
        return [torch.cat(samples)] if len(set(sizes)) == 1 else samples

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
        """Write the decoded latents, the last times and the last noised samples into `data_dict`; nothing else changes.

        Args:
            generator: one, or one per sample; None takes the one in the dictionary, else torch's default.
            timesteps: number of Euler steps; None means 25.
            vae_image_sizes: size of the latents: one int, `(h, w)` per sample, or None to read them from the dictionary.
            guidance_scale: 1.0 turns guidance off; may be a function of time.
            perform_norm_guidance: APG instead of plain classifier-free guidance.
        """
        num_steps = DEFAULT_NUM_STEPS if timesteps is None else timesteps
        if num_steps < 1:
            raise ValueError(f"timesteps={timesteps}: decoding needs at least one step")
        generator = data_dict.get(RNG_KEY) if generator is None else generator
        sizes = None if self.noise_read_key is not None else self._sizes(data_dict, vae_image_sizes)
        noise = self._start(data_dict, sizes, generator)
        batch = sum(samples.shape[0] for samples in noise)
        uniform = len(noise) == 1

        def entries(samples: Samples) -> PackedList | Samples:
            return PackedList(samples[0]) if uniform else samples

        last: DataDict = {}

        def predict(x: Samples, t: float, inputs: DataDict, copies: int) -> Samples:
            last[self.noised_images_read_key] = entries(x)
            last[self.timesteps_read_key] = torch.full((batch,), t, device=x[0].device)
            repeated = {key: repeat_batch(value, batch, copies) for key, value in last.items()}
            velocity = self.model({**inputs, **repeated})[self.reconst_write_key]
            return [PackedList.pack(velocity).tensor] if uniform else list(velocity)

        if not callable(guidance_scale) and guidance_scale == 1.0:
            velocity = lambda x, t: predict(x, t, data_dict, 1)  # noqa: E731
        else:
            # Both branches run as one batch of 2B samples: the conditional ones first.
            doubled = {key: repeat_batch(value, batch, 2) for key, value in data_dict.items()}
            flags = list(data_dict.get(NULL_CONDITION_KEY, [False] * batch))
            doubled[NULL_CONDITION_KEY] = flags + [True] * batch

            def pair(x: Samples, t: float) -> tuple[Samples, Samples]:
                both = predict(x, t, doubled, 2)
                if uniform:
                    return [both[0][:batch]], [both[0][batch:]]
                return both[:batch], both[batch:]

            velocity = guided(pair, guidance_scale, apg=perform_norm_guidance)
        decoded = sample_euler(velocity, noise, num_steps, _progress(verbose))
        data_dict.update(last)
        data_dict[self.reconst_write_key] = entries(decoded)
        return data_dict


def _progress(verbose: bool) -> Callable[[Iterable], Iterable]:
    """A progress bar over the steps where tqdm is installed, else none."""
    if not verbose:
        return iter
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iter
    return lambda steps: tqdm(steps, desc="decoding", leave=False)


