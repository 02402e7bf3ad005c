"""AdamW with a warm-up and a cosine: which parameters decay, and the learning rate at each step."""

import math
from collections.abc import Iterable, Mapping
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
    lr_scales: Mapping[str, float] | None = None,
    **adamw_options: Any,
) -> dict[str, Any]:
    """Build what `configure_optimizers` returns.

    Args:
        floor: the last learning rate as a fraction of `lr`.
        lr_scales: factors on the learning rate of parts, see `parameter_groups`.
        adamw_options: passed on, such as `betas`, `eps`, `fused`.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup_steps} cannot be used; valid: 0 to {total_steps - 1} "
            f"(below optimizer.total_steps={total_steps})"
        )
    options: dict[str, Any] = {n: tuple(value) if n == "betas" else value for n, value in adamw_options.items()}
    groups = parameter_groups(module.named_parameters(), weight_decay=weight_decay, lr=lr, lr_scales=lr_scales or {})
    optimizer = AdamW(groups, lr=lr, weight_decay=weight_decay, **options)
    factor = partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps, floor=floor)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
    }


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    lr: float | None = None,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not; leave out frozen ones.

    The first two groups learn at the rate of the optimizer; two more follow for each entry of `lr_scales`, from the
    name of a part (`encoder`, `decoder.module_dict.dec_from_latents`, `objective`) to a factor on `lr`. The longest
    name that fits a parameter counts. The name is in the group, as `part`, for whoever logs its learning rate.

    Raises ValueError for a factor that is not positive, and for a part of which nothing is trained.
    """
    lr_scales = lr_scales or {}
    wrong = [part for part, scale in lr_scales.items() if scale <= 0]
    if wrong:
        raise ValueError(
            f"optimizer.lr_scales.{wrong[0]}={lr_scales[wrong[0]]} cannot be used; valid: a positive number "
            "(initialize.freeze keeps a part as it is)"
        )
    groups: dict[str, list[dict[str, Any]]] = {}
    options: dict[str, Any]
    for part in ("", *lr_scales):
        options = {"part": part} if part else {}
        options |= {"lr": lr * lr_scales[part]} if part and lr is not None else {}
        groups[part] = [{"params": [], "weight_decay": decay, **options} for decay in (weight_decay, 0.0)]
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            parts = [part for part in lr_scales if belongs_to(name.removeprefix("model."), part)]
            decay, no_decay = groups[max(parts, key=len, default="")]
            (decay if decays(name, parameter) else no_decay)["params"].append(parameter)
    for part in lr_scales:
        if not any(group["params"] for group in groups[part]):
            raise ValueError(
                f"optimizer.lr_scales names {part!r}, of which nothing is trained; "
                "valid: encoder, decoder, or the beginning of the name of a weight"
            )
    return [group for pair in groups.values() for group in pair]


def belongs_to(name: str, part: str) -> bool:
    """Whether a weight is the one called `part`, or inside the module of that name."""
    return name == part or name.startswith(f"{part}.")


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
