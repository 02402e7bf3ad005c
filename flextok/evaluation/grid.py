"""The points of a sweep: each combination of `keep_k`, steps, guidance, form of the mask, backend, sparse attention."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from torch import nn

from flextok.evaluation.settings import EvaluationSettings
from flextok.evaluation.sparse_sweep import DENSE, SparseSweep
from flextok.model.preprocessors.nested_dropout_seq_packer import NestedDropoutSequencePacker
from flextok.model.sparse_attention import set_sparse_attention
from flextok.model.trunks.transformers import set_attention_backend

# Those that are called here as in `FlexTok.decode`, and that all points share.
SAMPLING_OPTIONS = ("sampler", "timestep_shift", "perform_norm_guidance", "guidance_interval", "guidance_every")


class Curve(NamedTuple):
    """What the points of one curve over `keep_k` have in common; None is what the model and the config say."""

    steps: int
    guidance_scale: float
    form: str | None = None
    backend: str | None = None
    maskers: str | None = None
    budget: float | None = None

    @property
    def label(self) -> str:
        """Such as `25 steps, guidance 3`."""
        guidance = [] if self.guidance_scale == 1.0 else [f"guidance {self.guidance_scale:g}"]
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        names = [name for name in (self.form, self.backend) if name is not None]
        budget = "" if self.maskers in (None, DENSE) else f" {self.budget:g}"
        return ", ".join([steps, *guidance, *names, *([] if self.maskers is None else [f"{self.maskers}{budget}"])])

    @property
    def columns(self) -> dict[str, Any]:
        """Form, backend and maskers only where several are compared."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def passes(self, sampler: str) -> int:
        """How often an image goes through the decoder, as far as an estimate of time needs it."""
        evaluations = 2 * self.steps - 1 if sampler == "heun" else self.steps
        return evaluations * (1 if self.guidance_scale == 1.0 else 2)


class Point(NamedTuple):
    """How to decode all images once."""

    keep_k: int
    curve: Curve

    @property
    def columns(self) -> dict[str, Any]:
        """The first columns of its results."""
        return {"keep_k": self.keep_k, **self.curve.columns}

    @property
    def name(self) -> str:
        """A name for its files."""
        return "_".join(f"{name}_{value}" for name, value in self.columns.items())

    @property
    def label(self) -> str:
        """Such as `4 tokens, 25 steps`."""
        return f"{tokens_label(self.keep_k)}, {self.curve.label}"

    def passes(self, sampler: str) -> int:
        """As those of its curve."""
        return self.curve.passes(sampler)


def tokens_label(keep_k: int) -> str:
    """Such as `4 tokens`."""
    return f"{keep_k} token{'s' if keep_k > 1 else ''}"


def make_grid(settings: EvaluationSettings, keep_ks: Sequence[int]) -> list[Point]:
    """All points, curve after curve, each with ascending `keep_k`."""
    forms, backends = (dict.fromkeys(values or (None,)) for values in (settings.forms, settings.backends))
    sparse: list[tuple[str | None, float | None]] = [(None, None)]
    if settings.sparse is not None:
        lists = settings.sparse.lists
        sparse = [(DENSE, 1.0), *((name, budget) for name, budgets in lists.items() for budget in budgets)]
    axes = (forms, backends, settings.steps, settings.guidance_scale)
    return [
        Point(keep_k, Curve(steps, guidance_scale, form, backend, maskers, budget))
        for form, backend, steps, guidance_scale in product(*axes)
        for maskers, budget in sparse
        for keep_k in keep_ks
    ]


def decode_options(settings: EvaluationSettings, curve: Curve) -> dict[str, Any]:
    """How to sample, as the arguments of `FlexTok.decode`."""
    shared = {name: getattr(settings, name) for name in SAMPLING_OPTIONS}
    return {"timesteps": curve.steps, "guidance_scale": curve.guidance_scale, **shared}


def check_forms(model: nn.Module, settings: EvaluationSettings) -> None:
    """Raise ValueError if forms of the mask are to be compared, and this model has no mask over its tokens."""
    if settings.forms is not None and not _packers(model):
        raise ValueError(
            f"evaluation.forms={list(settings.forms)!r}: the decoder of this model replaces dropped tokens by a mask "
            "token, so there is one form only; valid: null, or a model with dropout=attention_mask or packed"
        )


def prepare(model: nn.Module, curve: Curve, sparse: SparseSweep | None) -> None:
    """Let the model decode in the form, with the backend and with the maskers of a curve, where it names them."""
    if curve.form is not None:
        for packer in _packers(model):
            # Evaluation leaves hidden tokens out by itself; both together decide.
            packer.drop_masked = packer.shortens_rows = curve.form == "packed"
    if curve.backend is not None:
        set_attention_backend(model, curve.backend)  # type: ignore[arg-type]  # The settings have checked it.
    if curve.maskers is not None and sparse is not None:
        is_dense = curve.maskers == DENSE or curve.budget is None
        set_sparse_attention(model, None if is_dense else sparse.lists[curve.maskers][curve.budget])  # type: ignore[index]


def _packers(model: nn.Module) -> list[NestedDropoutSequencePacker]:
    return [module for module in model.modules() if isinstance(module, NestedDropoutSequencePacker)]
