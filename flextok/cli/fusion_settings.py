"""Overrides of the fuse config as checked settings; what the commands of fusion share on a command line."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn, get_args

if TYPE_CHECKING:
    from flextok.fusion.methods import MethodOptions

# Options of the programs before this one, and what stands for them now.
OLD_OPTIONS = {
    "--method": "fusion.method=...",
    "--model": "fusion.model=...",
    "--dataset": "fusion/data=webqa or fusion/data=myriadlama",
    "--device": "fusion.device=...",
    "--num_paraphrases": "fusion.num_paraphrases=...",
    "--num_ensemble": "fusion.num_paraphrases=...",
    "--indexs": "fusion.indices=[0,2,4]",
    "--max_samples": "fusion.limit=..., which counts questions",
    "--batch_size": "fusion.batch_size=...",
    "--lemmaize": "the command fusion-lemmatize",
    "--rewrite": "fusion.overwrite=true",
    "--num_manual": "fusion.sample.manual=...",
    "--num_auto": "fusion.sample.auto=...",
    "--num_samples": "fusion.sample.total=...",
    "--verbose": "the command fusion-inspect",
    "--max-samples": "the command fusion-inspect",
}
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("feather", "parquet")
STRATEGIES = ("greedy", "sampling", "beams")
# They decide where and how fast, not what comes out.
_NOT_RECORDED = ("device", "batch_size", "out", "format", "overwrite", "resume")


@dataclass(frozen=True, kw_only=True)
class FusionSettings:
    """The options of the config group `fusion`; `configs/fusion/default.yaml` says what they mean."""

    method: str
    model: str
    device: str
    dtype: str | None
    num_paraphrases: int
    indices: list[int] | None
    limit: int | None
    batch_size: int
    positions: str
    separator: str | None
    tail: str | None
    gap_keys: str
    shared_prefix: bool
    weights: str | None
    strategy: str
    temperature: float
    top_k: int | None
    top_p: float
    beams: int
    length_penalty: float
    seed: int
    confidence_samples: int
    backend: str
    out: str
    format: str
    lemmatizer: str
    overwrite: bool
    resume: bool
    max_new_tokens: int
    data: dict[str, Any]

    def __post_init__(self) -> None:
        from flextok.attention.masks.segments import GapKeys
        from flextok.fusion.attention import FusionBackend
        from flextok.fusion.lemmas import LEMMATIZERS
        from flextok.fusion.methods import METHODS
        from flextok.fusion.packing import Positions

        choices: dict[str, Sequence[str]] = {
            "method": METHODS,
            "positions": get_args(Positions),
            "gap_keys": get_args(GapKeys),
            "backend": get_args(FusionBackend),
            "strategy": STRATEGIES,
            "format": FORMATS,
            "lemmatizer": LEMMATIZERS,
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                _refuse(name, getattr(self, name), ", ".join(valid))
        _require(self, "dtype", lambda value: value in (None, *DTYPES), f"null, {', '.join(DTYPES)}")
        for name in ("num_paraphrases", "batch_size", "beams", "max_new_tokens"):
            _require(self, name, lambda value: _is_count(value, 1), "a whole number of at least 1")
        for name in ("limit", "top_k"):
            _require(self, name, lambda value: value is None or _is_count(value, 1), "null, or 1 or more")
        for name in ("seed", "confidence_samples"):
            _require(self, name, lambda value: _is_count(value, 0), "a whole number of at least 0")
        for name in ("shared_prefix", "overwrite", "resume"):
            _require(self, name, lambda value: isinstance(value, bool), "true, false")
        for name in ("model", "device", "out"):
            _require(self, name, lambda value: isinstance(value, str) and value != "", "a text")
        for name in ("separator", "tail", "weights"):
            _require(self, name, lambda value: value is None or isinstance(value, str), "null, or a text")
        _require(self, "temperature", lambda value: _is_number(value) and value > 0, "a number above 0")
        _require(self, "top_p", lambda value: _is_number(value) and 0 < value <= 1, "above 0 and at most 1")
        _require(self, "length_penalty", _is_number, "a number")
        _require(
            self,
            "indices",
            lambda value: value is None or (isinstance(value, list) and value and all(_is_count(n, 0) for n in value)),
            "null, or numbers of wordings from 0 on, such as [0,2,4]",
        )
        self._check_together()

    def _check_together(self) -> None:
        from flextok.fusion.methods import NEEDS_WEIGHTS, TAKES_WEIGHTS

        if self.method in NEEDS_WEIGHTS and self.weights is None:
            raise ValueError(
                f"fusion.method={self.method} needs fusion.weights; valid: uniform, or the file that "
                "fusion.method=per_prompt fusion.confidence_samples=100 writes"
            )
        if self.method not in TAKES_WEIGHTS and self.weights is not None:
            _refuse("weights", self.weights, f"null with fusion.method={self.method}")
        if self.method != "per_prompt" and self.confidence_samples:
            _refuse("confidence_samples", self.confidence_samples, "0, or fusion.method=per_prompt")
        if self.method == "per_prompt" and self.indices is not None and len({*self.indices}) < len(self.indices):
            _refuse("indices", self.indices, "each number once with fusion.method=per_prompt")

    def method_options(self) -> "MethodOptions":
        """What an `Answerer` is to do."""
        from flextok.fusion import Beams, Greedy, Sampling
        from flextok.fusion.methods import MethodOptions

        strategies: dict[str, Callable[[], Any]] = {
            "greedy": Greedy,
            "sampling": lambda: Sampling(self.temperature, self.top_k, self.top_p, self.seed),
            "beams": lambda: Beams(self.beams, self.length_penalty),
        }
        same = [field.name for field in fields(MethodOptions) if hasattr(self, field.name)]
        values: dict[str, Any] = {name: getattr(self, name) for name in same}
        return MethodOptions(**(values | {"strategy": strategies[self.strategy](), "shared_tail": self.tail != ""}))

    def recorded(self) -> dict[str, Any]:
        """What decides about the answers, as a file of results says it."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_RECORDED}


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides, and an error for each of `OLD_OPTIONS`."""
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="of the fuse config, such as fusion.limit=20")
    for option in OLD_OPTIONS:
        parser.add_argument(option, nargs="*", action=_Renamed, help=argparse.SUPPRESS, dest=argparse.SUPPRESS)


def read_settings(overrides: Sequence[str], **changes: Any) -> FusionSettings:
    """Compose `configs/fuse.yaml` and check it; `changes` replace single options.

    Raises:
        ValueError: an option is unknown or has a value that cannot be used.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from flextok.config import compose, describe_error

    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    if {"fusion.indices", "fusion.num_paraphrases"} <= given:
        raise ValueError("fusion.indices and fusion.num_paraphrases exclude each other; valid: one of them")
    try:
        config = compose(overrides, "fuse")
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ValueError(f"{missing[0]} is missing; give {missing[0]}=...")
        values = OmegaConf.to_container(config.fusion, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(describe_error(error)) from error
    assert isinstance(values, dict)
    return _from_mapping({str(name): value for name, value in values.items()} | changes)


def _from_mapping(values: Mapping[str, Any]) -> FusionSettings:
    names = [field.name for field in fields(FusionSettings)]
    # The data config has read it.
    unknown = [name for name in values if name not in (*names, "sample")]
    if unknown:
        raise ValueError(f"fusion.{unknown[0]} is unknown; valid: {', '.join(names)}")
    return FusionSettings(**{name: values[name] for name in names})


class _Renamed(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> NoReturn:
        assert option_string is not None
        parser.error(f"{option_string} is no option any more; use {OLD_OPTIONS[option_string]}")


def _require(settings: FusionSettings, name: str, is_valid: Callable[[Any], Any], valid: str) -> None:
    if not is_valid(getattr(settings, name)):
        _refuse(name, getattr(settings, name), valid)


def _refuse(name: str, value: Any, valid: str) -> NoReturn:
    raise ValueError(f"fusion.{name}={value!r} cannot be used; valid: {valid}")


def _is_count(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
