"""Lists of maskers to compare with dense attention, each at several budgets: `evaluation.sparse` and `budgets`."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flextok.config import CONFIG_FOLDER
from flextok.model.sparse_attention import SparseAttention

DENSE = "dense"
"""What stands for no maskers in a sweep."""
PRESETS = CONFIG_FOLDER / "attention" / "sparse"


@dataclass(frozen=True)
class SparseSweep:
    """By name and budget, what to decode with; and the lists as they were written, for the protocol."""

    lists: Mapping[str, Mapping[float, SparseAttention]]
    written: Mapping[str, Any]


def sparse_sweep(attention: DictConfig, names: Any, budgets: Any) -> SparseSweep | None:
    """The lists with these names: presets of `configs/attention/sparse`, and the one that `attention` itself holds.

    Other options are those of `attention`.

    Raises:
        ValueError: without `attention=sparse`, with a name or a budget that is none, or with encoders, whose tokens
            are the same for all points.
    """
    if names is None:
        return None
    names = [names] if isinstance(names, str) else names
    if "maskers" not in attention:
        raise ValueError(f"evaluation.sparse={names!r} needs the options of sparse attention: add attention=sparse")
    if attention.part != "decoder":
        raise ValueError(f"evaluation.sparse compares decoders, attention.part={attention.part!r}; valid: decoder")
    known = sorted({attention.name, *(file.stem for file in PRESETS.glob("*.yaml"))})
    if not isinstance(names, Sequence) or not names or any(name not in known for name in names):
        raise ValueError(f"evaluation.sparse={names!r}: valid are null and some of {', '.join(known)}")
    budgets = budgets if isinstance(budgets, Sequence) and not isinstance(budgets, str) else [budgets]
    if not budgets or not all(type(budget) in (int, float) and 0 < budget <= 1 for budget in budgets):
        raise ValueError(f"evaluation.budgets={budgets!r}: valid are numbers above 0 and up to 1")
    lists, written = {}, {}
    for name in dict.fromkeys(names):
        node = _node_of(attention, name)
        written[name] = OmegaConf.to_container(node, resolve=False)
        lists[name] = {budget: _at_budget(node, budget) for budget in sorted({float(budget) for budget in budgets})}
    return SparseSweep(lists, written)


def attention_choices(attention: DictConfig, sweep: SparseSweep | None) -> list[SparseAttention]:
    """All that a model will be asked for, last what `attention` itself says; none with dense attention alone."""
    if "maskers" not in attention:
        return []
    given: Any = OmegaConf.to_container(attention, resolve=True)
    several = () if sweep is None else sweep.lists.values()
    return [*(choice for by_budget in several for choice in by_budget.values()), SparseAttention.from_mapping(given)]


def attention_protocol(attention: DictConfig) -> dict[str, Any] | None:
    """The options of sparse attention, with a sum of the weights they name; None without."""
    if "maskers" not in attention:
        return None
    node: Any = OmegaConf.to_container(attention, resolve=True)
    file = OmegaConf.select(attention, "hash.file", throw_on_missing=False)
    return node if file is None else {**node, "weights_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}


def _node_of(attention: DictConfig, name: str) -> DictConfig:
    """The options of `attention` with the list of that name, interpolations unresolved."""
    given: Any = OmegaConf.to_container(attention, resolve=False)
    if name == attention.name:
        return OmegaConf.create(given)
    others = {key: value for key, value in given.items() if key not in ("name", "maskers")}
    merged = OmegaConf.merge(OmegaConf.load(PRESETS / f"{name}.yaml"), others)
    assert isinstance(merged, DictConfig)
    return merged


def _at_budget(node: DictConfig, budget: float) -> SparseAttention:
    # Below a root of its own: presets refer to `attention.budget`.
    config = OmegaConf.create({"attention": OmegaConf.merge(node, {"budget": budget})})
    plain: Any = OmegaConf.to_container(config.attention, resolve=True, throw_on_missing=True)
    return SparseAttention.from_mapping(plain)
