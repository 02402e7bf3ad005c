"""Write what was found: `metrics.json`, `metrics.csv`, `rate_distortion.png`, `grid.png`, and a table."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flextok.evaluation.reconstruction import PSNR_CAP
from flextok.evaluation.sweep import SweepResult
from flextok.pictures import image_grid, save_image
from flextok.utils.checkpoint import atomic_path

TABLE_COLUMNS = {
    "keep_k": ("keep_k", "{:d}"),
    "bits_per_image": ("bits", "{:.1f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "psnr_se": ("± se", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "mae": ("MAE", "{:.4f}"),
    "mse": ("MSE", "{:.5f}"),
    "seconds_per_image": ("s/image", "{:.4f}"),
}
# Metrics that not every evaluation has.
MORE_COLUMNS = {"ms_ssim": "{:.4f}", "fid_": "{:.3f}", "kid_": "{:.5f}"}


def write_report(sweep: SweepResult, protocol: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write all files into `folder` and return the content of `metrics.json`.

    `metrics.json` is written last: where it exists, the other files belong to it.
    """
    from flextok.evaluation.plot import plot_rate_distortion

    metrics = {
        "protocol": dict(protocol),
        "results": sweep.results,
        "vae": sweep.vae,
        "tokens": sweep.tokens,
    }
    write_csv(sweep.results, folder / "metrics.csv")
    plot_rate_distortion(sweep.results, sweep.vae, folder / "rate_distortion.png")
    save_image(image_grid(grid_rows(sweep)), folder / "grid.png")
    with atomic_path(folder / "metrics.json") as temporary:
        # NaN and infinity are no JSON; better to fail here than in the reader.
        temporary.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return metrics


def write_csv(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per `keep_k`, the columns of `results` in `metrics.json`; what is unknown stays empty."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)


def grid_rows(sweep: SweepResult) -> dict[str, Tensor]:
    """Labelled rows of the picture: original, VAE reconstruction, then every `keep_k`."""
    quality = f"{sweep.vae['psnr']:.1f} dB" if sweep.vae["psnr"] < PSNR_CAP else "lossless"
    rows = {"original": sweep.originals, f"VAE only\n{quality}": sweep.vae_reconstructions}
    for result in sweep.results:
        keep_k = result["keep_k"]
        label = f"{keep_k} token{'s' if keep_k > 1 else ''}\n{result['psnr']:.1f} dB"
        rows[label] = sweep.reconstructions[keep_k]
    return rows


def format_table(metrics: Mapping[str, Any]) -> str:
    """The results as aligned text, one line per `keep_k`, then the VAE alone, token statistics, what is missing."""
    columns = TABLE_COLUMNS | _more_columns(metrics)
    lines = [[title for title, _ in columns.values()]]
    for result in [*metrics["results"], {"keep_k": "VAE", **metrics["vae"]}]:
        lines.append([_cell(result.get(name), form) for name, (_, form) in columns.items()])
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    tokens = metrics["tokens"]
    summary = (
        f"{metrics['protocol']['num_images']} images; codebook usage {tokens['codebook_usage']:.1%} "
        f"of {tokens['codebook_size']}, perplexity {tokens['perplexity']:.1f}, "
        f"entropy {tokens['entropy_bits_mean']:.2f} of {tokens['bits_per_token']:.2f} bits per token"
    )
    reasons = metrics["vae"].get("missing")
    return "\n".join([*table, summary, *([f"missing: {reasons}"] if reasons else [])]) + "\n"


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
