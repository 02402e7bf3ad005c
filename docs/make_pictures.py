"""Remake what the code drew for the documents: the pictures of concepts.md and the outputs of the notebook.

python docs/make_pictures.py [FOLDER]     FOLDER takes the pictures, else docs/images; then the notebook is left alone
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import hydra.utils
import nbclient
import nbformat
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flextok import FlexTokFromHub
from flextok.config import compose
from flextok.embedded import embedded_model
from flextok.flow_matching.path import interpolate
from flextok.model.keep_k import KeepKMode, sample_keep_k
from flextok.pictures import image_grid, save_image
from flextok.reconstruct import Encoded, decode_tokens, encode_images
from flextok.regularizers.quantize_fsq import FSQ

DOCS = Path(__file__).resolve().parent
FORMS = ("mask_token", "attention_mask", "packed")
NUM_IMAGES, STEPS = 8, 4


class Photos:
    """The embedded photos model, and the first crops of its test split with their tokens."""

    def __init__(self) -> None:
        self.model = FlexTokFromHub.from_pretrained(embedded_model("photos"))
        data = hydra.utils.instantiate(compose(["data=photos"]).data)
        data.setup("test")
        samples = [data.datasets["test"][number] for number in range(NUM_IMAGES)]
        self.images = torch.stack([sample["image"] for sample in samples])
        keys = [sample["key"] for sample in samples]
        with torch.no_grad():
            self.encoded: Encoded = encode_images(self.model, self.images, keys, seed=0)

    def decoded(self, keep_k: int, steps: int = STEPS, **options: object) -> Tensor:
        """`[NUM_IMAGES, 3, 32, 32]` from the first `keep_k` tokens."""
        return decode_tokens(self.model, self.encoded, keep_k=keep_k, seed=0, timesteps=steps, **options)


def prefixes(photos: Photos, file: Path) -> None:
    """Images, and what their first 1, 2, 4, ... tokens decode to."""
    rows = {f"{k} token{'s' * (k > 1)}": photos.decoded(k) for k in (1, 2, 4, 8, 16, 32)}
    save_image(image_grid({"image": photos.images} | rows), file)


def quantizer(photos: Photos, file: Path) -> None:
    """Left: from a number of the encoder to a level. Right: where two channels of real registers fall."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    curves, plane = figure.subplots(1, 2)
    numbers = torch.linspace(-3, 3, 601)
    for levels in (8, 5):
        fsq = FSQ("x", "quants", "tokens", levels=[levels])
        curves.plot(numbers, fsq.quantize(numbers[:, None]), label=f"{levels} levels")
    _label(curves, "one channel", "what the encoder gives", "code")
    curves.legend()
    regularizer = photos.model.regularizer
    registers = torch.cat(registers_of(photos))[..., 2:4]
    both = FSQ("x", "quants", "tokens", levels=regularizer.levels[2:4])
    bounded, codes = both.bound(registers) / (both._levels // 2), both.quantize(registers)
    plane.plot(*bounded.flatten(0, 1).T, ".", markersize=3, color="tab:blue", label="before rounding")
    plane.plot(*codes.flatten(0, 1).T, "s", markersize=6, fillstyle="none", color="tab:red", label="codes in use")
    _label(plane, f"channels 3 and 4 of {NUM_IMAGES} images", "channel 3", "channel 4")
    plane.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=90)


@torch.no_grad()
def registers_of(photos: Photos) -> list[Tensor]:
    """`[1, registers, channels]` per image, as the quantizer gets them."""
    model = photos.model
    data = model.vae.encode({model.vae.images_read_key: list(photos.images.split(1))})
    return list(model.encoder(data)[model.regularizer.latents_read_key])


def keep_k_distributions(photos: Photos, file: Path) -> None:
    """How often training keeps how many of 32 tokens."""
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    generator = torch.Generator().manual_seed(0)
    for axes, mode in zip(figure.subplots(1, 3, sharey=True), get_args(KeepKMode), strict=True):
        drawn = torch.tensor(sample_keep_k(mode, [32] * 100_000, generator)).clamp(max=32)
        axes.bar(range(1, 33), torch.bincount(drawn, minlength=33)[1:] / len(drawn))
        _label(axes, f"keep_k_sampling={mode}", "keep_k", "share")
        axes.label_outer()
    figure.savefig(file, dpi=90)


def nested_dropout(photos: Photos, file: Path) -> None:
    """Who sees whom in the decoder in training, in each form: 2 samples of 4 patches and 8 registers."""
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    for axes, form in zip(figure.subplots(1, 3), FORMS, strict=True):
        mask, lengths = decoder_mask(form, keep_ks=[2, 5])
        axes.imshow(mask, cmap="Blues", vmin=-0.1, vmax=1.3, interpolation="nearest")
        ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="grey", linewidth=0.8)
            axes.axvline(end - 0.5, color="grey", linewidth=0.8)
        middles = [end - (length + 1) / 2 for end, length in zip(ends, lengths, strict=True)]
        axes.set_yticks(middles, ["patches", "registers"] * 2)
        axes.set_xticks([])
        _label(axes, f"dropout={form}", f"{len(mask)} tokens", "")
    figure.savefig(file, dpi=90)


@torch.no_grad()
def decoder_mask(form: str, keep_ks: list[int]) -> tuple[Tensor, list[int]]:
    """`[tokens, tokens]` of a row of two samples, and how many patches and registers of each are in it."""
    sizes = ("data=digits", "size.registers=8", "size.null_condition_prob=0")
    model = hydra.utils.instantiate(compose([*sizes, f"dropout={form}"]).model).train()
    data: dict[str, Any] = {
        "enc_registers_quant": [torch.zeros(1, 8, 6)] * 2,
        "vae_latents_noised": [torch.zeros(1, 3, 8, 8)] * 2,
        "sampled_keep_k": keep_ks,
    }
    for name, module in model.decoder.module_dict.items():
        data = module(data)
        if name == "dec_seq_packer":
            break
    layout = data["dec_block_mask"]
    return layout.dense_mask(), [length for sample in layout.lengths for length in sample]


def flow(photos: Photos, file: Path) -> None:
    """Training: an image on its way to noise. Sampling: what the decoder makes of noise, step by step."""
    number, vae = 4, photos.model.vae
    latents = photos.encoded.latents[number]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noised = [interpolate(latents, noise, time[None]) for time in torch.linspace(0, 1, NUM_IMAGES)]
    on_the_way = torch.cat(list(vae.decode({vae.vae_latents_read_key: noised})[vae.images_reconst_write_key]))
    few = torch.stack([photos.decoded(32, steps)[number] for steps in (1, 2, 3, 4, 6, 10, 25, 50)])
    rows = {"t = 0 (data)\nto t = 1 (noise)": on_the_way, "1, 2, 3, 4, 6, 10,\n25, 50 steps": few}
    save_image(image_grid(rows), file)


def guidance(photos: Photos, file: Path) -> None:
    """Eight tokens at several scales."""
    rows = {f"scale {scale:g}": photos.decoded(8, 10, guidance_scale=scale) for scale in (1.0, 2.0, 4.0)}
    rows["scale 4, APG"] = photos.decoded(8, 10, guidance_scale=4.0, perform_norm_guidance=True)
    save_image(image_grid({"image": photos.images} | rows), file)


PICTURES: dict[str, Callable[[Photos, Path], None]] = {
    "concepts_prefixes.png": prefixes,
    "concepts_quantizer.png": quantizer,
    "concepts_keep_k.png": keep_k_distributions,
    "concepts_nested_dropout.png": nested_dropout,
    "concepts_flow.png": flow,
    "concepts_guidance.png": guidance,
}


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def executed(file: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel; an error in a cell is an error here."""
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, record_timing=False, coalesce_streams=True).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # Warnings of libraries are those of one machine.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # beside the same picture as PNG
    return notebook


def main(folder: Path | None) -> None:
    photos = Photos()
    for name, draw in PICTURES.items():
        draw(photos, (folder or DOCS / "images") / name)
    if folder is None:
        nbformat.write(executed(DOCS / "tokenizer.ipynb"), DOCS / "tokenizer.ipynb")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
