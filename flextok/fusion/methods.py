"""All ways to answer a question that comes in several wordings, behind one interface.

| method         | the answer is read off |
| -------------- | ---------------------- |
| `fusion`       | all wordings in one sequence, which are kept apart while they are read |
| `avg`          | the mean of the logits of the wordings, run apart |
| `max`          | the largest probability that any wording gives |
| `weighted_avg` | the weighted mean of the logits |
| `weighted_max` | the wording of the largest weight alone |
| `origin`       | the first wording alone |
| `per_prompt`   | each wording alone: one answer per wording |

The prompt of a wording has the same tokens in all of them, and fusion of a single wording is `origin`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from flextok.attention.masks.segments import GapKeys
    from flextok.fusion.attention import FusionBackend
    from flextok.fusion.packing import Positions
    from flextok.fusion.strategies import Strategy

Method = Literal["fusion", "avg", "max", "weighted_avg", "weighted_max", "origin", "per_prompt"]
METHODS: tuple[Method, ...] = get_args(Method)
NEEDS_WEIGHTS = ("weighted_avg", "weighted_max")
TAKES_WEIGHTS = ("fusion", *NEEDS_WEIGHTS)


@dataclass(frozen=True)
class Answer:
    """One generated text, and what it took."""

    text: str
    num_prompt_tokens: int
    """Tokens that the model read for it, over all wordings."""
    num_new_tokens: int
    """Tokens of the text, the one that ended it included."""
    seconds: float
    """Its share of the time of the batch."""
    samples: tuple[str, ...] = ()
    """Sampled texts beside it, for a confidence."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """How prompts are put together and continued; `configs/fusion/default.yaml` says what the options mean."""

    method: Method
    max_new_tokens: int
    positions: "Positions"
    separator: str | None
    shared_prefix: bool
    """Whether instruction and examples are read once for all wordings."""
    shared_tail: bool
    """Whether the cue for the answer comes once, after the wordings; else each wording ends with it."""
    gap_keys: "GapKeys"
    backend: "FusionBackend"
    strategy: "Strategy"
    confidence_samples: int
    """Of `per_prompt`: so many sampled texts beside each answer."""

    def __post_init__(self) -> None:
        """ValueError for an unknown method, and samples of another method than `per_prompt`."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; valid: {', '.join(METHODS)}")
        if self.confidence_samples and self.method != "per_prompt":
            raise ValueError(
                f"confidence_samples={self.confidence_samples} with method={self.method!r}; valid: 0, or "
                "method='per_prompt'"
            )
