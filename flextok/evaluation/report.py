"""Write what was found: numbers as JSON, CSV and Parquet, pictures, and a table."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from flextok.evaluation.grid import Curve, tokens_label
from flextok.evaluation.html_report import write_html
from flextok.evaluation.pictures import as_floats
from flextok.evaluation.plot import curve_label, curves_of, over_density, rate_distortion, without_budgets
from flextok.evaluation.points import text as key_text
from flextok.evaluation.reconstruction import PSNR_CAP
from flextok.evaluation.sweep import SweepResult
from flextok.pictures import image_grid, save_image
from flextok.utils.checkpoint import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_COLUMNS = {
    "keep_k": ("keep_k", "{:d}"),
    "steps": ("steps", "{:d}"),
    "guidance_scale": ("guidance", "{:g}"),
    "form": ("form", "{}"),
    "backend": ("backend", "{}"),
    "maskers": ("maskers", "{}"),
    "budget": ("budget", "{:g}"),
    "density": ("density", "{:.3f}"),
    "bits_per_image": ("bits", "{:.1f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "psnr_se": ("± se", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "mae": ("MAE", "{:.4f}"),
    "mse": ("MSE", "{:.5f}"),
    "seconds_per_image": ("s/image", "{:.4f}"),
}
# Columns that say which curve a row is of; shown where there are several.
AXES = Curve._fields
# Metrics that not every evaluation has.
MORE_COLUMNS = {"ms_ssim": "{:.4f}", "fid_": "{:.3f}", "kid_": "{:.5f}"}


def write_report(sweep: SweepResult, protocol: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write all files into `folder` and return the content of `metrics.json`.

    `metrics.json` is written last: where it exists, the other files belong to it.
    """
    metrics = {
        "protocol": dict(protocol),
        "results": sweep.results,
        "vae": sweep.encoded.vae,
        "tokens": sweep.encoded.tokens,
        "targets": sweep.targets,
    }
    write_csv(sweep.results, folder / "metrics.csv")
    write_parquet(sweep, folder / "results.parquet")
    write_lengths(sweep, folder / "lengths.parquet")
    figure = rate_distortion(curves_of(without_budgets(sweep.results)), sweep.encoded.vae, ("psnr", "ssim"))
    _save_figure(figure, folder / "rate_distortion.png")
    if len(without_budgets(sweep.results)) < len(sweep.results):
        _save_figure(over_density(sweep.results), folder / "sparse.png")
    grid = image_grid(grid_rows(sweep))
    save_image(grid, folder / "grid.png")
    write_html(sweep, metrics, table_cells(metrics), grid, folder / "report.html")
    with atomic_path(folder / "metrics.json") as temporary:
        # NaN and infinity are no JSON; better to fail here than in the reader.
        temporary.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return metrics


def _save_figure(figure: "Figure", path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def write_csv(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per point, the columns of `results` in `metrics.json`; what is unknown stays empty."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)


def write_parquet(sweep: SweepResult, path: Path) -> None:
    """One row per point and image, in the order of points and keys: what a point is, the image, its metrics.

    The same numbers give the same bytes.
    """
    import pyarrow as pa
    from pyarrow import parquet

    encoded = sweep.encoded
    images = {"key": [key_text(key) for key in encoded.keys], "image_sha256": encoded.sums}
    tables = []
    for point, numbers in zip(sweep.points, sweep.numbers, strict=True):
        axes = {name: [value] * len(encoded.keys) for name, value in point.columns.items()}
        metrics = {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in numbers.per_image.items()}
        tables.append(pa.table({**axes, **images, **metrics}))
    with atomic_path(path) as temporary:
        parquet.write_table(pa.concat_tables(tables), temporary)


def write_lengths(sweep: SweepResult, path: Path) -> None:
    """One row per target, curve and image: the tokens that the image needs, null where all are not enough, and bits.

    Where nobody asked, or all networks are missing, there is no such file; one of an earlier evaluation is removed.
    """
    import pyarrow as pa
    from pyarrow import parquet

    encoded = sweep.encoded
    images = {"key": [key_text(key) for key in encoded.keys], "image_sha256": encoded.sums}
    tables = []
    for search, numbers in zip(sweep.searches, sweep.lengths, strict=True):
        if numbers is not None:
            about = {name: [value] * len(encoded.keys) for name, value in search.columns.items()}
            tokens = np.array(numbers.per_image["tokens"])
            bits = tokens * encoded.tokens["bits_per_token"]
            columns = {
                "tokens": pa.array(tokens, from_pandas=True).cast(pa.int32()),
                "bits": pa.array(bits, from_pandas=True),
                "bits_per_pixel": pa.array(bits / np.array(numbers.per_image["pixels"]), from_pandas=True),
            }
            tables.append(pa.table({**about, **images, **columns}))
    if not tables:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary:
        parquet.write_table(pa.concat_tables(tables), temporary)


def grid_rows(sweep: SweepResult) -> dict[str, Tensor]:
    """Labelled rows of the picture, `[N, 3, H, W]` in [-1, 1]: original, VAE reconstruction, then every point."""
    encoded = sweep.encoded
    quality = f"{encoded.vae['psnr']:.1f} dB" if encoded.vae["psnr"] < PSNR_CAP else "lossless"
    rows = {"original": as_floats(encoded.originals), f"VAE only\n{quality}": as_floats(encoded.vae_reconstructions)}
    curves = {point.curve for point in sweep.points}
    for point, result, pictures in zip(sweep.points, sweep.results, sweep.pictures, strict=True):
        curve = [point.curve.label] if len(curves) > 1 else []
        rows["\n".join([tokens_label(point.keep_k), f"{result['psnr']:.1f} dB", *curve])] = as_floats(pictures.first)
    return rows


def format_table(metrics: Mapping[str, Any]) -> str:
    """The results as aligned text, one line per point, then the VAE alone, token statistics, what is missing."""
    lines = table_cells(metrics)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    tokens = metrics["tokens"]
    summary = (
        f"{metrics['protocol']['num_images']} images; codebook usage {tokens['codebook_usage']:.1%} "
        f"of {tokens['codebook_size']}, perplexity {tokens['perplexity']:.1f}, "
        f"entropy {tokens['entropy_bits_mean']:.2f} of {tokens['bits_per_token']:.2f} bits per token"
    )
    reasons = metrics["vae"].get("missing")
    lengths = [target_line(row) for row in metrics["targets"]]
    return "\n".join([*table, summary, *lengths, *([f"missing: {reasons}"] if reasons else [])]) + "\n"


def target_line(row: Mapping[str, Any]) -> str:
    """What came of one target, as a sentence."""
    start = f"{row['target']}, {curve_label(row)}: "
    if "missing" in row:
        return f"{start}not measured, for its network is missing"
    failed = f"{row['not_met']:.1%} of the images do not meet it with all tokens"
    if row["tokens"] is None:
        return start + failed
    return (
        f"{start}{row['tokens']:.1f} tokens per image, {row['bits_per_image']:.1f} bits, "
        f"{row['bits_per_pixel']:.4f} bits per pixel; {failed}"
    )


def table_cells(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The results as text: a header, one line per point, the VAE alone."""
    columns = {name: column for name, column in TABLE_COLUMNS.items() if name not in AXES or _varies(metrics, name)}
    if not any("density" in result for result in metrics["results"]):
        del columns["density"]
    columns |= _more_columns(metrics)
    lines = [[title for title, _ in columns.values()]]
    for result in [*metrics["results"], {"keep_k": "VAE", **metrics["vae"]}]:
        lines.append([_cell(result.get(name), form) for name, (_, form) in columns.items()])
    return lines


def _varies(metrics: Mapping[str, Any], name: str) -> bool:
    return len({result.get(name) for result in metrics["results"]}) > 1


def _more_columns(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    forms = MORE_COLUMNS | dict.fromkeys(metrics["protocol"]["distances"], "{:.4f}")
    known = {name: form for name in metrics["vae"] for start, form in forms.items() if name.startswith(start)}
    return {
        name: (name, form)
        for name, form in known.items()
        if metrics["vae"][name] is not None and not name.endswith("_se")
    }


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else form.format(value)
