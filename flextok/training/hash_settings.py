"""What hash projections are made of and how they are trained. Light: `--help` reads it."""

from dataclasses import dataclass

from flextok.training.setting_option import setting_option

ACTIVATIONS = ("silu", "relu", "gelu", "tanh")


@dataclass(frozen=True, kw_only=True)
class HashSettings:
    """Sizes and training; each is an option of `flextok train-hash` with underscores as dashes.

    Raises:
        ValueError: A value is out of range.
    """

    mlp_layers: int = setting_option(2, "matrices of each perceptron")
    hidden: int = setting_option(64, "width between them")
    activation: str = setting_option("silu", "between them", ACTIVATIONS)
    target: float = setting_option(0.1, "share of the keys that count as the right ones: those of the largest logits")
    steps: int = setting_option(500, "steps of the optimizer")
    batch_size: int = setting_option(4, "sequences in a step")
    lr: float = setting_option(3e-3, "peak learning rate; falls as a cosine to 0")
    seed: int = setting_option(0, "of the weights and of what a step sees")

    def __post_init__(self) -> None:
        for name in ("mlp_layers", "hidden", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if not 0 < self.target < 1:
            raise ValueError(f"target={self.target}: it must be above 0 and below 1")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: it must be above 0")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: valid are {', '.join(ACTIVATIONS)}")
