"""Draw quality against the number of tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flextok.evaluation.reconstruction import PSNR_CAP
from flextok.utils.checkpoint import atomic_path

PANELS = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
LINE, BOUND = "#1f4e79", "#888888"


def plot_rate_distortion(results: Sequence[Mapping[str, Any]], vae: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with PSNR and SSIM over `keep_k`; bars are standard errors, dashed is the VAE alone."""
    # Without pyplot there is no global state and no display: a bare Figure draws with Agg.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    keep_ks = [result["keep_k"] for result in results]
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        values = [result[name] for result in results]
        errors = [result[f"{name}_se"] or 0.0 for result in results]
        axes.errorbar(keep_ks, values, yerr=errors, marker="o", markersize=4, capsize=2, color=LINE)
        # A lossless VAE bounds nothing, and its line would press the curve flat.
        if vae["psnr"] < PSNR_CAP:
            axes.axhline(vae[name], linestyle="--", linewidth=1, color=BOUND, label="VAE only")
            axes.legend(frameon=False, fontsize=8)
        axes.set_xscale("log", base=2)
        ticks = [f"{result['keep_k']}\n{result['bits_per_image']:.0f}" for result in results]
        axes.set_xticks(keep_ks, ticks, fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("tokens kept (below: bits per image)")
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
