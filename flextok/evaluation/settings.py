"""What an evaluation is asked to do, checked before anything is loaded. Defaults: `configs/evaluation/`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from flextok.attention.engine import BackendChoice
from flextok.evaluation.reconstruction import METRICS
from flextok.evaluation.sparse_sweep import SparseSweep
from flextok.evaluation.targets import Target
from flextok.flow_matching.sampling import check_sampling
from flextok.model.keep_k import default_keep_ks

SPLITS = ("test", "val")
WEIGHTS = ("ema", "raw")
# Names of columns that no network may take; every metric has `<name>_se` beside it.
OTHER_COLUMNS = (
    *("keep_k", "steps", "guidance_scale", "form", "backend", "maskers", "budget", "density"),
    *("key", "image_sha256"),
    *("bits_per_image", "seconds_per_image", "psnr_of_mean_mse", "missing"),
)
FORMS = ("attention_mask", "packed")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The options of the `evaluation` config group; `configs/evaluation/default.yaml` says what they mean."""

    num_images: int | None
    split: Literal["test", "val"]
    keep_ks: tuple[Any, ...] | None  # checked by `resolve_keep_ks`, when the model is known
    steps: tuple[int, ...]
    sampler: str
    timestep_shift: float
    guidance_scale: tuple[float, ...]
    perform_norm_guidance: bool
    guidance_interval: tuple[float, float]
    guidance_every: int
    weights: Literal["ema", "raw"]
    batch_size: int
    seed: int
    grid_images: int
    forms: tuple[str, ...] | None
    backends: tuple[str, ...] | None
    sparse: SparseSweep | None
    budgets: Any  # checked by `sparse_sweep`
    targets: tuple[Target, ...] | None
    resume: bool
    device: str
    features: dict[str, dict[str, Any]]
    distances: dict[str, dict[str, Any]]
    kid_subsets: int
    kid_subset_size: int
    reference_cache: str
    import_references: str | None
    export_references: str | None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "EvaluationSettings":
        """Build from the `evaluation` node of a config; unknown and missing names are errors."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in values if name not in names)
        if unknown:
            raise ValueError(f"evaluation.{unknown[0]}: unknown option; valid are {', '.join(names)}")
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"evaluation.{missing[0]}: missing; needed are {', '.join(names)}")
        _check_options(values)
        low, high = values["guidance_interval"]
        # A whole number is what a command line gives for one that happens to be whole.
        typed: dict[str, Any] = {
            "timestep_shift": float(values["timestep_shift"]),
            "guidance_interval": (float(low), float(high)),
            "guidance_scale": tuple(sorted({float(scale) for scale in _listed(values["guidance_scale"])})),
            "steps": tuple(sorted(set(_listed(values["steps"])))),
        }
        # Those of `keep_ks` are checked when the model is known.
        for name in ("keep_ks", "forms", "backends"):
            typed[name] = None if values[name] is None else tuple(_listed(values[name]))
        if values["sparse"] is not None and values["backends"] is not None:
            raise ValueError("evaluation.backends and evaluation.sparse: compare one of them at a time, null is none")
        typed["targets"] = None if values["targets"] is None else _targets(values)
        return cls(**{**values, **typed})


def resolve_keep_ks(keep_ks: Sequence[Any] | None, num_registers: int) -> list[int]:
    """The token counts to evaluate, ascending and without repeats.

    None means the powers of two below `num_registers`, and `num_registers` itself.
    """
    if keep_ks is None:
        return default_keep_ks(num_registers)
    if len(keep_ks) == 0:
        raise ValueError(f"evaluation.keep_ks=[]: valid is null or numbers from 1 to {num_registers}")
    for keep_k in keep_ks:
        if isinstance(keep_k, bool) or not isinstance(keep_k, int) or not 1 <= keep_k <= num_registers:
            raise ValueError(
                f"evaluation.keep_ks={list(keep_ks)!r}: {keep_k!r} is none of the whole numbers from 1 to "
                f"{num_registers}, the number of registers of this model"
            )
    return sorted(set(keep_ks))


def _check_options(values: Mapping[str, Any]) -> None:
    if values["num_images"] is not None:
        _require_int("num_images", values["num_images"], minimum=1)
    for name, minimum in (
        *(("batch_size", 1), ("grid_images", 1), ("seed", 0)),
        *(("kid_subsets", 1), ("kid_subset_size", 2)),
    ):
        _require_int(name, values[name], minimum=minimum)
    _require_choice("split", values["split"], SPLITS)
    _require_choice("weights", values["weights"], WEIGHTS)
    _check_axes(values)
    for name in ("perform_norm_guidance", "resume"):
        if not isinstance(values[name], bool):
            raise ValueError(f"evaluation.{name}={values[name]!r}: valid are true and false")
    checked = ("sampler", "timestep_shift", "guidance_interval", "guidance_every")
    check_sampling(**{name: values[name] for name in checked}, prefix="evaluation.")
    if not isinstance(values["device"], str):
        raise ValueError(f"evaluation.device={values['device']!r}: valid is a name such as auto, cpu or cuda")
    for name in ("reference_cache", "import_references", "export_references"):
        if not isinstance(values[name], str) and (values[name] is not None or name == "reference_cache"):
            raise ValueError(f"evaluation.{name}={values[name]!r}: valid is a folder")
    for group in ("features", "distances"):
        _check_networks(group, values[group])


def _check_axes(values: Mapping[str, Any]) -> None:
    """Those of which one or several values may be given."""
    for name in ("steps", "guidance_scale", "forms", "backends"):
        if values[name] is not None and not _listed(values[name]):
            raise ValueError(f"evaluation.{name}={values[name]!r}: valid are one value or several")
    for steps in _listed(values["steps"]):
        _require_int("steps", steps, minimum=1)
    for scale in _listed(values["guidance_scale"]):
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"evaluation.guidance_scale={scale!r}: valid are finite numbers, 1.0 is off")
    for name, choices in (("forms", FORMS), ("backends", get_args(BackendChoice))):
        for value in [] if values[name] is None else _listed(values[name]):
            _require_choice(name, value, choices)


def _targets(values: Mapping[str, Any]) -> tuple[Target, ...]:
    names = [*values["distances"], *values["features"]]
    texts = _listed(values["targets"])
    try:
        targets = [Target.parse(str(text), networks=names) for text in texts]
    except ValueError as error:
        raise ValueError(
            f"evaluation.targets: {error}; other names are those of networks, as with evaluation/distances=lpips"
        ) from error
    unclear = [target for target in targets if names.count(target.metric) > 1]
    if unclear or not targets:
        which = f"{unclear[0].metric!r} names two networks" if unclear else "null means none"
        raise ValueError(f"evaluation.targets={texts!r}: {which}; valid: targets such as psnr=24")
    return tuple(dict.fromkeys(targets))


def _listed(value: Any) -> list[Any]:
    # A single value is what `evaluation.keep_ks=4` on a command line gives.
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _check_networks(group: str, networks: object) -> None:
    if not isinstance(networks, Mapping):
        raise ValueError(f"evaluation.{group}={networks!r}: valid are networks by name, {{<name>: {{_target_: ...}}}}")
    for name, config in networks.items():
        # A name becomes a column of the results.
        if not isinstance(name, str) or not name.isidentifier() or name in (*METRICS, *OTHER_COLUMNS):
            raise ValueError(f"evaluation.{group}: {name!r} is no name for a network; valid are letters, digits and _")
        if not isinstance(config, Mapping) or not isinstance(config.get("_target_"), str):
            raise ValueError(f"evaluation.{group}.{name}={config!r}: valid is a config with a _target_")


def _require_int(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"evaluation.{name}={value!r}: valid is a whole number of at least {minimum}")


def _require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"evaluation.{name}={value!r}: valid are {', '.join(choices)}")
