"""AdamW with a warm-up and a cosine: which parameters decay, and the learning rate at each step."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

# Vectors a token may take on, and tables of them. Pulling them towards zero would erase what they stand for.
NO_DECAY_NAMES = (
    "registers",
    "extra_registers",
    "posembs",
    "mask_token",
    "dropout_mask_token",
    "nullcond",
    "logvar",
)


def adamw_with_cosine(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    total_steps: int,
    floor: float,
    **adamw_options: Any,
) -> dict[str, Any]:
    """Build what `configure_optimizers` returns.

    Args:
        floor: the last learning rate as a fraction of `lr`.
        adamw_options: passed on, such as `betas`, `eps`, `fused`.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup_steps} cannot be used; valid: 0 to {total_steps - 1} "
            f"(below optimizer.total_steps={total_steps})"
        )
    options: dict[str, Any] = {n: tuple(value) if n == "betas" else value for n, value in adamw_options.items()}
    groups = parameter_groups(module.named_parameters(), weight_decay=weight_decay)
    optimizer = AdamW(groups, lr=lr, weight_decay=weight_decay, **options)
    factor = partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps, floor=floor)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
    }


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not; leave out frozen ones."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (decay if decays(name, parameter) else no_decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases and everything in `NO_DECAY_NAMES` do not."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in NO_DECAY_NAMES


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, floor: float) -> float:
    """Return the factor on the learning rate of optimizer step `step`, counted from 0.

    It rises linearly to 1 at `warmup_steps`, falls along a cosine to `floor` at `total_steps`, and stays.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
