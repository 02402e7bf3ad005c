"""Where a sampler is, for modules that act otherwise in other steps or keep something from pass to pass."""

from dataclasses import dataclass, field
from typing import Any

from flextok.model.data_dict import Generators

TRAJECTORY_KEY = "trajectory"


@dataclass
class Trajectory:
    """One way from noise to data; the sampler moves it on."""

    num_steps: int
    generator: Generators = None
    """What the noise came from: one, or one per sample. Both branches of guidance draw from that of their sample."""
    step: int = 0
    evaluation: int = 0
    """How often the model was called before: once per step with Euler, twice with Heun."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """What modules keep, each under a key of its own."""
