"""How many tokens do the images of an evaluation need for a target? A bisection for each, and what comes of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from flextok.attention.engine import record_backends
from flextok.evaluation.encoding import EncodedSplit
from flextok.evaluation.grid import Curve, decode_options, prepare
from flextok.evaluation.images import Batches
from flextok.evaluation.networks import Networks
from flextok.evaluation.points import PointNumbers
from flextok.evaluation.processes import joined
from flextok.evaluation.reconstruction import mean_and_error
from flextok.evaluation.settings import EvaluationSettings
from flextok.evaluation.shortest import num_rounds, tokens_needed
from flextok.evaluation.targets import Target

# Shares of the images of which the report says how many tokens are enough for them.
SHARES = {"p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9}


class Search(NamedTuple):
    """For a target and a curve of the grid: of each image the smallest number of tokens, at most `longest`."""

    target: Target
    curve: Curve
    longest: int

    @property
    def columns(self) -> dict[str, Any]:
        """The first columns of its results."""
        return {"target": str(self.target), **self.curve.columns}

    @property
    def name(self) -> str:
        """A name for its file."""
        return "_".join(f"{name}_{value}" for name, value in self.columns.items())

    @property
    def label(self) -> str:
        """Such as `psnr=24, 25 steps`."""
        return f"{self.target}, {self.curve.label}"

    def passes(self, sampler: str) -> int:
        """How often an image goes through the decoder, as far as an estimate of time needs it."""
        return num_rounds(self.longest) * self.curve.passes(sampler)


def make_searches(targets: Sequence[Target], curves: Sequence[Curve], longest: int) -> list[Search]:
    """All of them, target after target."""
    return [Search(target, curve, longest) for target in targets for curve in curves]


def reason_missing(search: Search, networks: Networks) -> str | None:
    """Why the network that it needs is not here; None if it is, or none is needed."""
    places = (f"{group}.{search.target.metric}" for group in ("distances", "features"))
    return next((networks.missing[place] for place in places if place in networks.missing), None)


@torch.no_grad()
def measure_lengths(
    model: Any,
    encoded: EncodedSplit,
    batches: Batches,
    search: Search,
    settings: EvaluationSettings,
    device: torch.device,
    networks: Networks,
    tell: Callable[[int], None],
) -> PointNumbers:
    """Per image `tokens`, NaN where all of them are not enough, and `pixels`; call it on every rank."""
    prepare(model, search.curve, settings.sparse)
    options = decode_options(settings, search.curve)
    tokens: list[float] = []
    pixels: list[float] = []
    with record_backends() as backends:
        for _, images, batch in encoded.read_again(batches, device):
            found = tokens_needed(
                *(model, images, batch, search.target),
                longest=search.longest,
                seed=settings.seed,
                networks=networks,
                **options,
            )
            tokens += [math.nan if number is None else float(number) for number in found]
            pixels += [float(images.shape[-2] * images.shape[-1])] * len(found)
            tell(len(found))
    return PointNumbers(
        per_image={"tokens": encoded.in_order(tokens), "pixels": encoded.in_order(pixels)},
        of_sets={},
        seconds_per_image=None,
        attention_backends=sorted(set(joined(set(backends)))),
    )


def summarize_lengths(
    search: Search, numbers: PointNumbers | None, bits_per_token: float, missing: str | None
) -> dict[str, Any]:
    """A row for JSON. Means are over the images that meet the target; `not_met` is the share of all others.

    `tokens_p10` ... `tokens_p90` are of all images: so many tokens are enough for that share of them, None where that
    many do not meet it. All are None without numbers, and `missing` says why.
    """
    row: dict[str, Any] = dict(search.columns)
    names = ("tokens", "tokens_se", *(f"tokens_{name}" for name in SHARES))
    row |= dict.fromkeys((*names, "not_met", "bits_per_image", "bits_per_pixel"))
    if numbers is None:
        return {**row, "missing": missing}
    lengths, pixels = numbers.per_image["tokens"], numbers.per_image["pixels"]
    met = sorted(length for length in lengths if not math.isnan(length))
    row["not_met"] = (len(lengths) - len(met)) / len(lengths)
    for name, share in SHARES.items():
        # The least number that is enough for at least that share; the tiny bit is for shares such as 0.1 of 10 images.
        rank = max(1, math.ceil(share * len(lengths) - 1e-9))
        row[f"tokens_{name}"] = int(met[rank - 1]) if rank <= len(met) else None
    if met:
        row["tokens"], row["tokens_se"] = mean_and_error(met)
        row["bits_per_image"] = row["tokens"] * bits_per_token
        rates = [
            length * bits_per_token / count
            for length, count in zip(lengths, pixels, strict=True)
            if not math.isnan(length)
        ]
        row["bits_per_pixel"] = mean_and_error(rates)[0]
    return row
