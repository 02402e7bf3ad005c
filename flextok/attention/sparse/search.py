"""What a list of maskers costs and saves, and a search for the best trade between the two with Optuna.

Configurations say in `search_space` what may be tried for each of their fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flextok.attention.sparse.attention import masked_attention
from flextok.attention.sparse.mask import Mask
from flextok.attention.sparse.research import ResearchAttention, ResearchAttentionConfig

if TYPE_CHECKING:
    from optuna import Study, Trial


class AttentionCall(NamedTuple):
    """Queries `(B, H, Sq, D)`, keys and values `(B, Hkv, Sk, D)` of one layer, as a model made them."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    attention_mask: Tensor | None = None
    layer_idx: int = 0


class Cost(NamedTuple):
    """Means over calls."""

    density: float
    """Share of pairs above 0 in the mask, from 0 to 1."""
    error: float
    """Norm of the difference to dense attention, relative to the norm of that."""


@torch.no_grad()
def cost_of(config: ResearchAttentionConfig, calls: Sequence[AttentionCall], *, seed: int) -> Cost:
    """Density and error of a list of maskers; `seed` is that of its draws.

    Raises:
        ValueError: there are no calls.
    """
    if not calls:
        raise ValueError("calls is empty; valid: one call of attention or more")
    attention = ResearchAttention.create_from_config(config)
    generator = torch.Generator().manual_seed(seed)
    costs = []
    for q, k, v, scaling, attention_mask, layer in calls:
        mask = attention.build_mask(q, k, v, attention_mask, scaling, 0.0, {}, layer_idx=layer, generator=generator)
        sparse, _ = masked_attention(q, k, v, mask, scaling, attention_mask)
        full = Mask.create_full_mask(mask.shape, mask.dtype, mask.device)
        dense, _ = masked_attention(q, k, v, full, scaling, attention_mask)
        costs.append((mask.get_density(), float((sparse - dense).norm() / dense.norm())))
    return Cost(*(sum(values) / len(costs) for values in zip(*costs, strict=True)))


def search(config: ResearchAttentionConfig, calls: Sequence[AttentionCall], *, num_trials: int, seed: int) -> "Study":
    """An Optuna study that made density and error small at once; `study.best_trials` are the best trades found.

    Raises:
        ValueError: no field of `config` has a search space, or one that is no list of values.
    """
    import optuna

    if not any(each.search_space for each in config.masker_configs):
        raise ValueError("search_space: no masker has one; valid: values to try by field, {'heavy_size': [0.05, 0.1]}")
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(lambda trial: tuple(cost_of(suggest(config, trial), calls, seed=seed)), n_trials=num_trials)
    return study


def suggest(config: ResearchAttentionConfig, trial: "Trial") -> ResearchAttentionConfig:
    """`config` with a value that the trial chose for each field that has a search space."""
    configs = []
    for place, each in enumerate(config.masker_configs):
        chosen: dict[str, Any] = {
            name: trial.suggest_categorical(f"{place}.{name}", _values(f"masker_configs[{place}]", name, space))
            for name, space in each.search_space.items()
        }
        configs.append(replace(each, **chosen))
    return ResearchAttentionConfig(configs)


def _values(where: str, name: str, space: Any) -> list[Any]:
    """The values in a list, in `{"grid_search": [...]}` or in an object with `categories`, as published ones are."""
    found = space.get("grid_search") if isinstance(space, Mapping) else getattr(space, "categories", space)
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"{where}.search_space[{name!r}]={space!r}; valid: a list of values to try")
    return list(found)
