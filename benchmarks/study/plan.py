"""What the study trains: every form of nested dropout, with both objectives, on both data sets, with several seeds."""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

FORMS = ("mask_token", "attention_mask", "packed")
OBJECTIVES = {"rectified_flow": "prefix", "prefix_and_full": "prefix + full"}
"""Options of the group `objective`, and what the report calls them."""


class Variant(NamedTuple):
    """What is compared."""

    form: str
    objective: str

    @property
    def name(self) -> str:
        return f"{self.form}-{self.objective}"

    @property
    def label(self) -> str:
        return f"{self.form}, {OBJECTIVES[self.objective]}"

    @property
    def overrides(self) -> list[str]:
        return [f"dropout={self.form}", f"objective={self.objective}"]


VARIANTS = [Variant(form, objective) for objective in OBJECTIVES for form in FORMS]


@dataclass(frozen=True)
class DataSet:
    """A data set, and the recipe that all variants share on it."""

    name: str
    overrides: tuple[str, ...]
    max_steps: int
    seeds: tuple[int, ...]


class Run(NamedTuple):
    """One training and its evaluation."""

    data: DataSet
    variant: Variant
    seed: int

    def folder(self, study: Path) -> Path:
        return study / self.data.name / self.variant.name / f"seed_{self.seed}"

    @property
    def training(self) -> list[str]:
        """Overrides of `train.py`; a run that was interrupted goes on."""
        steps = [f"trainer.max_steps={self.data.max_steps}", f"trainer.val_check_interval={self.data.max_steps}"]
        return [*self.data.overrides, *self.variant.overrides, f"seed={self.seed}", *steps, "ckpt_path=auto"]


@dataclass(frozen=True)
class Plan:
    """Everything that is trained, and how it is judged."""

    data: tuple[DataSet, ...]
    sampling_steps: tuple[int, ...]
    num_images: int | None = None
    """Of the test split; None is all of them."""

    def runs(self) -> list[Run]:
        """Seed after seed, so that an unfinished study has whole comparisons."""
        return [
            Run(data, variant, seed) for data in self.data for seed, variant in itertools.product(data.seeds, VARIANTS)
        ]

    @property
    def evaluation(self) -> list[str]:
        """Overrides of `eval.py`."""
        steps = ",".join(map(str, self.sampling_steps))
        images = "null" if self.num_images is None else self.num_images
        return [f"evaluation.steps=[{steps}]", f"evaluation.num_images={images}", "evaluation.grid_images=4"]

    def as_json(self) -> dict[str, Any]:
        """What a folder of runs is for; tuples become lists, as in a file."""
        return {
            "data": [{**asdict(d), "overrides": list(d.overrides), "seeds": list(d.seeds)} for d in self.data],
            "variants": [list(variant) for variant in VARIANTS],
            "sampling_steps": list(self.sampling_steps),
            "num_images": self.num_images,
        }


# One recipe per data set, chosen with mask tokens before the study. The photographs take a narrower and shallower model
# than `experiment=photos`, so that 18 trainings fit into an hour.
PLAN = Plan(
    data=(
        DataSet("digits", ("experiment=digits",), max_steps=1200, seeds=(0, 1, 2)),
        DataSet(
            "photos",
            (
                *("experiment=photos", "size.encoder_width=64", "size.decoder_width=64", "size.decoder_depth=3"),
                "optimizer.lr=4e-3",
            ),
            max_steps=800,
            seeds=(0, 1, 2),
        ),
    ),
    sampling_steps=(1, 2, 5, 25),
)
