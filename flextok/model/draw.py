"""Random draws of modules: from the generator in the data dictionary, else from torch's default generator.

`rng` may hold one generator for the batch or one per sample. With one per sample a draw for a sample depends on that
sample alone, whatever batch it sits in. NumPy's and Python's generators are never used.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flextok.model.data_dict import Generators


def _draw(
    fn: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    if generator is None:
        return fn(tuple(shape), device=device, dtype=dtype)
    if not isinstance(generator, torch.Generator) and len(generator) == 1 == shape[0]:
        generator = generator[0]
    if isinstance(generator, torch.Generator):
        return fn(tuple(shape), generator=generator, device=generator.device, dtype=dtype).to(device, non_blocking=True)
    if len(generator) != shape[0]:
        raise ValueError(
            f"rng holds {len(generator)} generators for a batch of {shape[0]}; give one, or one per sample"
        )
    rows = [fn((1, *shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.cat(rows).to(device, non_blocking=True)


def draw_normal(
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal values of `shape`, whose leading axis is the batch; drawn where the generator lives."""
    return _draw(torch.randn, shape, generator, device, dtype)


def draw_uniform(shape: Sequence[int], generator: Generators, device: torch.device | str | None = None) -> Tensor:
    """Uniform values in [0, 1) of `shape`, whose leading axis is the batch; drawn where the generator lives."""
    return _draw(torch.rand, shape, generator, device, None)


def generator_per_sample(generator: Generators, batch: int) -> list[Generators]:
    """One source of randomness for each of `batch` draws, made sample by sample."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * batch
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for a batch of {batch}; give one, or one per sample")
    return [[sample_generator] for sample_generator in generator]


def one_generator(generator: Generators) -> torch.Generator | None:
    """The generator for draws that concern the whole batch: the only one, or the first sample's."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return generator[0]
