"""The tables of docs/study.md, written from the JSON of the study; the sentences around them are written by people."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.analysis import COMPARISONS
from benchmarks.study.plan import Variant

Study = Mapping[str, Any]


def fill_in(text: str, content: Study) -> str:
    """The page with the tables of `content` between its markers, `<!-- table: name -->` and `<!-- /table -->`.

    Raises:
        ValueError: a table has no place in the page, or a place no table.
    """
    made = tables(content)
    places = re.findall(r"<!-- table: (.+?) -->", text)
    if sorted(places) != sorted(made):
        raise ValueError(f"docs/study.md has places for {sorted(places)}; the tables are {sorted(made)}")
    for name, table in made.items():
        start = f"<!-- table: {name} -->\n"
        before, _, rest = text.partition(start)
        _, end, after = rest.partition("<!-- /table -->")
        text = f"{before}{start}{table}\n{end}{after}"
    return text


def tables(content: Study) -> dict[str, str]:
    """Every table by name, in Markdown."""
    made = {}
    for study in content["studies"]:
        name = study["data"]
        steps = sorted({row["steps"] for row in study["curves"]})
        made[f"{name} curves"] = _curves(study, steps[-1])
        made[f"{name} differences"] = _differences(study, steps)
        made[f"{name} steps"] = _steps(study, steps)
        made[f"{name} tokens"] = _tokens(study)
        made[f"{name} speed"] = _speed(content["speed"][name])
    return made


def _curves(study: Study, steps: int) -> str:
    found = [row for row in study["curves"] if row["metric"] == "psnr" and row["steps"] == steps]
    header = ["PSNR (dB)", *(f"{k} token{'s' if k > 1 else ''}" for k in study["keep_ks"]), "mean, 95 %"]
    rows = []
    for form, objective in dict.fromkeys((row["form"], row["objective"]) for row in found):
        of = {row["keep_k"]: row for row in found if (row["form"], row["objective"]) == (form, objective)}
        values = [f"{of[k]['mean']:.2f}" for k in study["keep_ks"]]
        rows.append([Variant(form, objective).label, *values, _with_interval(of[None], "")])
    return markdown(header, rows)


def _differences(study: Study, steps: Sequence[int]) -> str:
    """Of the mean over all numbers of tokens, at the most and the fewest steps, and of SSIM at the most."""
    header = [
        "difference of the mean over the numbers of tokens",
        f"dB, {steps[-1]} steps; over trainings",
        "over images",
        f"dB, {_number_of_steps(steps[0])}",
        f"SSIM, {steps[-1]} steps",
    ]
    rows = []
    for baseline, other in COMPARISONS:

        def of(metric: str, count: int, pair: tuple[Variant, Variant] = (baseline, other)) -> Mapping[str, Any]:
            wanted = (metric, count, pair[0].name, pair[1].name, None)
            keys = ("metric", "steps", "baseline", "other", "keep_k")
            return next(row for row in study["differences"] if tuple(row[key] for key in keys) == wanted)

        most = of("psnr", steps[-1])
        images = f"{most['images_low']:+.2f} to {most['images_high']:+.2f}"
        fewest, ssim = of("psnr", steps[0]), of("ssim", steps[-1])
        rows.append(
            [
                f"{other.label} − {baseline.label}",
                *(_with_interval(most, "+"), images, _with_interval(fewest, "+"), _with_interval(ssim, "+", digits=3)),
            ]
        )
    return markdown(header, rows)


def _steps(study: Study, steps: Sequence[int]) -> str:
    found = [row for row in study["curves"] if row["metric"] == "psnr" and row["keep_k"] is None]
    rows = []
    for form, objective in dict.fromkeys((row["form"], row["objective"]) for row in found):
        of = {row["steps"]: row["mean"] for row in found if (row["form"], row["objective"]) == (form, objective)}
        rows.append([Variant(form, objective).label, *(f"{of[count]:.2f}" for count in steps)])
    return markdown(["mean PSNR (dB)", *(_number_of_steps(count) for count in steps)], rows)


def _tokens(study: Study) -> str:
    rows = []
    for row in study["tokens"]:
        entropy = row["entropy_bits_per_position"]
        places = [entropy[place - 1] for place in study["keep_ks"]]
        values = [*(f"{value:.2f}" for value in places), _with_interval(row["mean_entropy"], "")]
        rows.append([Variant(row["form"], row["objective"]).label, *values])
    ceiling = study["tokens"][0]["entropy_ceiling_bits"]
    header = [f"entropy (bits, at most {ceiling:.0f})", *(f"position {k}" for k in study["keep_ks"]), "mean, 95 %"]
    return markdown(header, rows)


def _speed(rows: Iterable[Mapping[str, Any]]) -> str:
    made = []
    for row in rows:
        decoded = [f"{value:,.0f}" for value in row["decoded_per_second"].values()]
        training = [f"{row['images_per_second']:,.0f}", f"{row['times_faster']:.2f}", f"{row['saved_mebibytes']:.1f}"]
        made.append([Variant(row["form"], row["objective"]).label, *training, *decoded])
        ends = list(row["decoded_per_second"])
    header = ["", "training images/s", "times as fast as mask_token", "MiB kept for backward"]
    return markdown([*header, *(f"decoded images/s, {k} token{'s' if k != '1' else ''}" for k in ends)], made)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_interval(row: Mapping[str, float], sign: str, *, digits: int = 2) -> str:
    low, high = (f"{row[end]:{sign}.{digits}f}" for end in ("low", "high"))
    return f"{row['mean']:{sign}.{digits}f} ({low} to {high})"


def _number_of_steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"
