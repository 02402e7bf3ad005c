"""`SparseState`: a list of maskers at work in a model, and what they know of every sequence that it reads."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from flextok.attention.sparse import (
    GeometricMasker,
    ResearchAttention,
    ResearchAttentionConfig,
    ResearchMasker,
    gathered_attention,
    masked_attention,
)
from flextok.attention.sparse.attention import weighted_logits
from flextok.seeding import mixed_seed
from flextok.sparse_lm.handler import AttentionHandler, Rows
from flextok.sparse_lm.prefill import causal_prefill, count_pairs


class Sequence:
    """One row of a batch: `sparse_meta_data` of its maskers and the random numbers it draws."""

    def __init__(self, seed: int, device: torch.device, padding: int) -> None:
        self.meta_data: dict[Any, Any] = {}
        # The same for each: what a sequence gives does not depend on which batch it is in.
        self.generator = torch.Generator(device).manual_seed(mixed_seed(seed, "sparse attention"))
        self.padding = padding

    @property
    def knows_keys(self) -> bool:
        """Whether maskers keep something of its keys; hyperplanes are the same for all sequences."""
        return any(content for name, content in self.meta_data.items() if name != "projections")

    def copy(self) -> "Sequence":
        """Another one that goes on from here."""
        result = Sequence(0, self.generator.device, self.padding)
        # Deep: a masker of somebody else may write into what it keeps.
        result.meta_data = deepcopy(self.meta_data)
        result.generator.set_state(self.generator.get_state())
        return result


class SparseState(AttentionHandler):
    """Attention under a list of maskers, row by row: a sequence gives the same in a batch as alone.

    A row's state is found again by its keys when a batch is reordered, cut or repeated, as beam search does; a row
    that is not known starts anew, which costs time and changes nothing.
    """

    def __init__(
        self, config: ResearchAttentionConfig, *, dense_prefill: bool, seed: int, measure: bool, gather: bool
    ) -> None:
        """Arguments: `sparse_attention`."""
        self.config = config
        self.attention = ResearchAttention.create_from_config(config)
        self.dense_prefill, self.seed, self.measure = dense_prefill, seed, measure
        maskers = self.attention.maskers
        self._is_geometric = all(isinstance(masker, GeometricMasker) for masker in maskers)
        self._can_gather = gather and all(type(masker).select is not ResearchMasker.select for masker in maskers)
        self.sequences: list[Sequence] = []
        self._known_keys: Tensor | None = None
        self._is_first_layer = True
        self.num_pairs, self.num_possible = 0, 0

    @property
    def density(self) -> float:
        """Share of the pairs of a query and a key up to it that were attended to, since `measure` began; 0 for none."""
        return self.num_pairs / self.num_possible if self.num_possible else 0.0

    def begin_pass(self) -> None:
        super().begin_pass()
        self._is_first_layer = True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scaling: float, meta_data: Any) -> Tensor:
        if meta_data is not None:
            self.sequences = self._given(meta_data, rows, q.device)
        elif self._is_first_layer:
            self._find_sequences(k, rows)
        self._is_first_layer = False
        output = q.new_zeros(len(q), q.shape[2], q.shape[1], v.shape[3])
        for row, sequence in enumerate(self.sequences):
            start = rows.padding[row]
            num_queries = min(q.shape[2], k.shape[2] - start)
            mine = slice(row, row + 1)
            part = q[mine, :, -num_queries:], k[mine, :, start:], v[mine, :, start:]
            output[mine, -num_queries:] = self._attend_row(layer, *part, rows, row, scaling, sequence)
        return output

    def _attend_row(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Rows, row: int, scaling: float, sequence: Sequence
    ) -> Tensor:
        num_queries, num_keys = q.shape[2], k.shape[2]
        options = {"layer_idx": layer, "generator": sequence.generator}
        if num_queries > 1 and rows.in_order and (self._is_geometric or self.dense_prefill):
            configs = () if self.dense_prefill else self.config.masker_configs
            if self.measure:
                self._count(count_pairs(configs, num_queries, num_keys) * q.shape[1], q, num_keys)
            return causal_prefill(q, k, v, configs, scaling)
        mask = rows.mask_of(row)
        if num_queries == 1 and self._can_gather:
            chosen = self.attention.select(q, k, mask, sequence.meta_data, **options)
            if self.measure:
                self._count(int((chosen.probabilities > 0).sum()), q, num_keys)
            return gathered_attention(q, k, v, chosen, scaling, mask)
        if num_queries > 1 and self.dense_prefill:
            return masked_attention(
                q, k, v, ResearchAttention([]).build_mask(q, k, v, mask, scaling, 0.0, None), scaling, mask
            )[0]
        chosen_mask = self.attention.build_mask(q, k, v, mask, scaling, 0.0, sequence.meta_data, **options)
        if self.measure:
            active = weighted_logits(q, k, chosen_mask, scaling, mask) > float("-inf")
            self._count(int(active.sum()), q, num_keys)
        return masked_attention(q, k, v, chosen_mask, scaling, mask)[0]

    def _count(self, pairs: int, q: Tensor, num_keys: int) -> None:
        num_queries = q.shape[2]
        self.num_pairs += pairs
        self.num_possible += (num_queries * (2 * num_keys - num_queries + 1) // 2) * q.shape[1]

    def _find_sequences(self, k: Tensor, rows: Rows) -> None:
        """The sequences of a call of the model, by the keys of its first layer: those are its tokens, in effect."""
        known, before = self.sequences, self._known_keys
        is_new = rows.num_queries == rows.num_keys
        if is_new or len(known) != len(k) or any(sequence.knows_keys for sequence in known):
            places = [] if is_new or before is None else _matches(before, k, known, rows.padding)
            taken: set[int] = set()
            self.sequences = []
            for row, padding in enumerate(rows.padding):
                place = places[row] if places else None
                if place is None:
                    self.sequences.append(Sequence(self.seed, k.device, padding))
                else:
                    self.sequences.append(known[place].copy() if place in taken else known[place])
                    taken.add(place)
        self._known_keys = k

    def _given(self, meta_data: Any, rows: Rows, device: torch.device) -> list[Sequence]:
        """Sequences of the caller's dictionaries."""
        given = [meta_data] if isinstance(meta_data, dict) else meta_data
        if (
            not isinstance(given, list)
            or len(given) != len(rows.padding)
            or not all(isinstance(x, dict) for x in given)
        ):
            raise ValueError(
                f"sparse_meta_data is a {type(meta_data).__name__} for {len(rows.padding)} rows; valid: a dictionary "
                "per row, in a list, or a dictionary for a single row"
            )
        if self._is_first_layer or len(self.sequences) != len(given):
            self.sequences = [Sequence(self.seed, device, padding) for padding in rows.padding]
        for sequence, content in zip(self.sequences, given, strict=True):
            sequence.meta_data = content
        return self.sequences


def _matches(before: Tensor, now: Tensor, known: list[Sequence], padding: list[int]) -> list[int | None]:
    """For each row of `now` the row of `before` that it continues, itself rather than another; None for none."""
    if before.shape[2] >= now.shape[2] or before.shape[1] != now.shape[1] or len(before) != len(known):
        return [None] * len(now)
    past = now[:, :, : before.shape[2]]
    found: list[int | None] = []
    for row, start in enumerate(padding):
        candidates = sorted(range(len(before)), key=lambda other: other != row)
        same = (n for n in candidates if known[n].padding == start and torch.equal(before[n], past[row]))
        found.append(next(same, None))
    return found
