"""AdamW with a warm-up and a cosine: which parameters decay, and the learning rate at each step."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from flextok.model.init import width_multiples

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
    groups = parameter_groups(
        module.named_parameters(),
        weight_decay=weight_decay,
        lr=lr,
        lr_scales=lr_scales,
        divisors=mup_divisors(module),
    )
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
    divisors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not; leave out frozen ones.

    The first two groups learn at the rate of the optimizer; two more follow for each entry of `lr_scales`, from the
    name of a part (`encoder`, `decoder.module_dict.dec_from_latents`, `objective`) to a factor on `lr`. The longest
    name that fits a parameter counts. The name is in the two groups, as `part`, for whoever logs its learning rate.
    Behind each two come those of weights, by name, whose rate muP divides (`divisors`); their decay per step, which is
    rate times `weight_decay`, stays.

    Raises ValueError for a factor that is not positive, and for a part of which nothing is trained.
    """
    lr_scales, divisors = lr_scales or {}, divisors or {}
    wrong = [part for part, scale in lr_scales.items() if scale <= 0]
    if wrong:
        raise ValueError(
            f"optimizer.lr_scales.{wrong[0]}={lr_scales[wrong[0]]} cannot be used; valid: a positive number "
            "(initialize.freeze keeps a part as it is)"
        )
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    options: dict[str, Any]
    for part, divisor in product(("", *lr_scales), (1.0, *sorted({*divisors.values()} - {1.0}))):
        scale = lr_scales.get(part, 1.0) / divisor
        options = {"part": part} if part and divisor == 1.0 else {}
        options |= {"lr": lr * scale} if scale != 1.0 and lr is not None else {}
        decays_by = (weight_decay * divisor, 0.0)
        groups[part, divisor] = [{"params": [], "weight_decay": decay, **options} for decay in decays_by]
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            parts = [part for part in lr_scales if belongs_to(name.removeprefix("model."), part)]
            decay, no_decay = groups[max(parts, key=len, default=""), divisors.get(name, 1.0)]
            (decay if decays(name, parameter) else no_decay)["params"].append(parameter)
    for part in lr_scales:
        if not any(group["params"] for (its, _), pair in groups.items() if its == part for group in pair):
            raise ValueError(
                f"optimizer.lr_scales names {part!r}, of which nothing is trained; "
                "valid: encoder, decoder, or the beginning of the name of a weight"
            )
    return [group for (_, divisor), pair in groups.items() for group in pair if divisor == 1.0 or group["params"]]


def mup_divisors(module: nn.Module) -> dict[str, float]:
    """By name, what muP divides the learning rate of a weight by: how many times as many inputs it has.

    Empty where no base shapes are set. A layer that divides its inputs itself keeps its rate.
    """
    return {
        f"{name}.weight": 1.0 if getattr(layer, "divides_by_width", False) else width_multiples(layer)[1]
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and hasattr(layer, "mup_base")
    }


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
