"""Sparse self-attention in encoder and decoder: which maskers act in which layers and steps; off unless asked for.

Selection has no gradient; attention under it has one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from flextok.attention.backends.research import MaskStore, draws
from flextok.attention.engine import AttentionRequest, BackendChoice
from flextok.attention.plan import AttentionPlan
from flextok.attention.sparse import HashAttentionTopKMasker, ResearchAttention, build_config
from flextok.attention.sparse_plan import LayerMaskers, counted_dense, plan_sparse
from flextok.model.data_dict import RNG_KEY, DataDict, Generators
from flextok.model.draw import generator_per_sample, one_generator
from flextok.model.trajectory import TRAJECTORY_KEY, Trajectory
from flextok.model.trunks.transformers import trunks_of

Part = Literal["decoder", "encoder", "both"]
Maskers = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SparseAttention:
    """The options of the config group `attention` that sparse attention has; `configs/attention/sparse.yaml`."""

    maskers: Maskers
    part: Part
    layers: Sequence[int] | Mapping[int, Maskers | None] | None
    dense_first_steps: int
    dense_last_steps: int
    masks_every: int

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "SparseAttention":
        """Build from the `attention` node of a config, whose other options are left alone.

        Raises:
            ValueError: what is wrong with an option, by its name; also what maskers say about theirs.
        """
        if values["part"] not in get_args(Part):
            raise ValueError(f"attention.part={values['part']!r}: valid are {', '.join(get_args(Part))}")
        for name, minimum in (("dense_first_steps", 0), ("dense_last_steps", 0), ("masks_every", 1)):
            if type(values[name]) is not int or values[name] < minimum:
                raise ValueError(f"attention.{name}={values[name]!r}: valid is a whole number of at least {minimum}")
        budget, backend = values["budget"], values["backend"]
        if type(budget) not in (int, float) or not 0 < budget <= 1:
            raise ValueError(f"attention.budget={budget!r}: valid is a number above 0 and up to 1")
        if backend == "varlen":
            raise ValueError("attention.backend='varlen' takes no mask; valid with sparse attention: auto, reference")
        _check_maskers("attention.maskers", values["maskers"], backend)
        return cls(
            maskers=values["maskers"],
            part=values["part"],
            layers=_checked_layers(values["layers"], backend),
            **{name: values[name] for name in ("dense_first_steps", "dense_last_steps", "masks_every")},
        )

    def of_layers(self, depth: int) -> dict[int, Maskers]:
        """The maskers of each layer that is not dense; ValueError for layers that a trunk of this depth lacks."""
        named: Mapping[int, Maskers | None] = (
            self.layers
            if isinstance(self.layers, Mapping)
            else dict.fromkeys(range(depth) if self.layers is None else self.layers)
        )
        beyond = [layer for layer in named if not 0 <= layer < depth]
        if beyond:
            raise ValueError(
                f"attention.layers: {beyond} do not exist in a trunk of depth {depth}; valid: 0 to {depth - 1}"
            )
        return {layer: self.maskers if maskers is None else maskers for layer, maskers in named.items()}


class TrunkSparsity:
    """Sparse attention of one trunk: makes the plans of its layers in each pass."""

    def __init__(self, trunk: nn.Module, settings: SparseAttention) -> None:
        """ValueError if layers do not exist, or the weights of a masker do not fit them."""
        blocks: Any = trunk.blocks
        self._settings = settings
        self._layers = {
            layer: LayerMaskers(layer, build_config(maskers).masker_configs)
            for layer, maskers in settings.of_layers(len(blocks)).items()
        }
        for layer, maskers in self._layers.items():
            _check_weights(layer, maskers.attention, blocks[layer])
        self._draws = any(draws(maskers.attention) for maskers in self._layers.values())

    def plans(
        self, request: AttentionRequest, dense: AttentionPlan, data_dict: DataDict, backend: BackendChoice
    ) -> Callable[[int], AttentionPlan]:
        """The plan of each layer in this pass, `dense` where no masker acts."""
        assert dense.layout is not None
        layout, trajectory = dense.layout, data_dict.get(TRAJECTORY_KEY)
        if not self._acts_in(trajectory):
            counted = counted_dense(dense)
            return lambda layer: counted
        generator = data_dict.get(RNG_KEY) if trajectory is None else trajectory.generator
        seeds = self._seeds(generator, len(layout.lengths)) if self._draws else None
        store = self._store(trajectory)

        def plan_of(layer: int) -> AttentionPlan:
            if layer not in self._layers:
                return counted_dense(dense)
            return plan_sparse(request, self._layers[layer], backend, seeds=seeds, store=store)

        return plan_of

    def _acts_in(self, trajectory: Trajectory | None) -> bool:
        if trajectory is None:
            return True
        last = trajectory.num_steps - self._settings.dense_last_steps
        return self._settings.dense_first_steps <= trajectory.step < last

    def _store(self, trajectory: Trajectory | None) -> MaskStore | None:
        if trajectory is None or self._settings.masks_every == 1:
            return None
        store: MaskStore = trajectory.memory.setdefault(self, MaskStore(self._settings.masks_every))
        store.now = trajectory.evaluation
        return store

    @staticmethod
    def _seeds(given: Generators, batch: int) -> list[int]:
        """One per sample, drawn in their order, so that it does not matter with which others a sample is computed."""
        if isinstance(given, Sequence) and len(given) < batch:
            given = [*given] * (batch // len(given))  # Guidance runs both of its branches as one batch.
        sources = map(one_generator, generator_per_sample(given, batch))
        return [
            int(torch.randint(2**31, (), generator=source, device=None if source is None else source.device))
            for source in sources
        ]


def set_sparse_attention(model: Any, settings: SparseAttention | None) -> None:
    """Let the trunks of a FlexTok that `settings` name attend sparsely, and all others densely; None: all.

    Raises:
        ValueError: layers that do not exist, weights of a masker that do not fit, or a mask that no masker can act on.
    """
    for part in ("encoder", "decoder"):
        for trunk in trunks_of(getattr(model, part)):
            chosen = settings is not None and settings.part in (part, "both")
            trunk.sparsity = TrunkSparsity(trunk, settings) if chosen and settings is not None else None


def _check_maskers(field: str, maskers: Any, backend: str) -> None:
    """ValueError for a list that cannot be built, or that would take the keys of one step for those of another."""
    try:
        made = LayerMaskers(0, build_config(maskers).masker_configs)
    except ValueError as error:
        raise ValueError(str(error).replace("masker_configs", field)) from error
    for place, config in enumerate(made.configs):
        if getattr(config, "cache_keys", False):
            raise ValueError(
                f"{field}[{place}].cache_keys=True: keys of another step are other keys, not more of them; valid: false"
            )
    if not made.is_geometric and backend not in ("auto", "reference"):
        raise ValueError(
            f"attention.backend={backend!r} cannot choose keys by content, as {field} does; valid: auto, reference"
        )


def _checked_layers(layers: Any, backend: str) -> Sequence[int] | dict[int, Maskers | None] | None:
    valid = "null (all), numbers of layers such as [0,1], or a mapping from them to lists of maskers"
    if layers is None:
        return None
    if not isinstance(layers, Mapping | Sequence) or isinstance(layers, str) or not layers:
        raise ValueError(f"attention.layers={layers!r}: valid are {valid}")
    numbers = [int(layer) if str(layer).isdecimal() else layer for layer in layers]
    if any(type(number) is not int for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"attention.layers={layers!r}: valid are {valid}")
    if not isinstance(layers, Mapping):
        return numbers
    for layer, maskers in layers.items():
        if maskers is not None:
            _check_maskers(f"attention.layers.{layer}", maskers, backend)
    return dict(zip(numbers, layers.values(), strict=True))


def _check_weights(layer: int, attention: ResearchAttention, block: Any) -> None:
    """ValueError unless the weights of HashAttention are made for the heads of this layer."""
    layers = block.attn if hasattr(block, "attn") else block.self_attn
    heads, width = layers.num_heads, layers.wq.out_features // layers.num_heads
    for masker in attention.maskers:
        if isinstance(masker, HashAttentionTopKMasker):
            if layer not in masker.weights:
                raise ValueError(
                    f"hat_weight_file: there are no weights for layer {layer}; it has {sorted(masker.weights)}"
                )
            for side in ("query", "key"):
                shape = tuple(masker.weights[layer][f"{side}_matrix"][0].shape[:2])
                if shape != (heads, width):
                    raise ValueError(
                        f"hat_weight_file: layer {layer}, {side}, is made for {shape[0]} heads of {shape[1]}; "
                        f"this trunk has {heads} of {width}"
                    )


def is_sparse(attention: Mapping[str, Any]) -> bool:
    """Whether the `attention` node of a config asks for maskers."""
    return "maskers" in attention
