"""The parts of the page that show results, as HTML: everything they show is in them, and names are escaped."""

from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from flextok.data.transforms import to_pil
from flextok.demo.mask import ATTENDS, ATTENDS_MASK_TOKEN, HIDDEN, MASK_COLORS, decoder_layout, draw_mask, full_mask
from flextok.demo.pictures import LARGEST_CHANGE, change, data_uri, draw_change
from flextok.demo.workbench import Reading, Reconstruction, Sampling, Workbench
from flextok.evaluation.grid import tokens_label
from flextok.model.keep_k import default_keep_ks

# Below, the browser draws pixels as squares; above, it smooths.
_SMALL_SIDE = 160
_MASK_WORDS = {
    ATTENDS: "attends",
    ATTENDS_MASK_TOKEN: "attends to a mask token, which says nothing of the image",
    HIDDEN: "does not",
}

# Run by the page for the examples: a click on one of them becomes a click event with its name.
CHOOSE_EXAMPLE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-name]");
  if (button) trigger("click", {name: button.dataset.name});
});
"""
_EXAMPLES = "Photographs of scikit-image and scikit-learn; embedded:photos was trained on parts of these scenes."
_NO_EXAMPLES = "Examples come with scikit-image and scikit-learn, which are not installed: pip install 'flextok[data]'"

WELCOME = "<div class='ft-welcome'>Drop an image on the left, or choose one of the examples.</div>"


def message(text: str) -> str:
    """What went wrong, in a box that stays until the next image; nothing for no text."""
    return f"<div class='ft-message' role='alert'>{escape(text)}</div>" if text else ""


def examples(thumbnails: Mapping[str, Image.Image]) -> str:
    """A button for each photograph to try, and what they are."""
    buttons = "".join(
        f"<button type='button' data-name='{name}' title='{name}'><img src='{data_uri(image)}' alt='{name}'></button>"
        for name, image in thumbnails.items()
    )
    note = _EXAMPLES if thumbnails else _NO_EXAMPLES
    return f"<h4>Examples</h4><div class='ft-examples'>{buttons}</div><p class='ft-note'>{note}</p>"


def results(workbench: Workbench, readings: Sequence[Reading], keep_k: int, sampling: Sampling) -> str:
    """One card per model: the image, its reconstruction from `keep_k` tokens, what the last of them changed."""
    return f"<div class='ft-cards'>{''.join(_card(workbench, r, keep_k, sampling) for r in readings)}</div>"


def gallery(workbench: Workbench, readings: Sequence[Reading], sampling: Sampling) -> str:
    """Per model a strip of reconstructions from more and more tokens, and below it what each step changed."""
    strips = [(reading.model.name, _strip(workbench, reading, sampling)) for reading in readings]
    num_columns = max(len(strip) for _, strip in strips)
    # Columns stand below each other where models have different numbers of tokens.
    rows = [
        f"<h4>{escape(name)}</h4><div class='ft-strip'>{''.join(strip)}"
        f"{'<figure></figure>' * (num_columns - len(strip))}</div>"
        for name, strip in strips
    ]
    return (
        "<section class='ft-gallery'><h3>More and more tokens</h3>"
        "<p class='ft-note'>Below each reconstruction: what it changed in the one before it, on the scale "
        f"<i class='ft-scale'></i> from 0 to {LARGEST_CHANGE} of 255.</p>{''.join(rows)}</section>"
    )


def _card(workbench: Workbench, reading: Reading, keep_k: int, sampling: Sampling) -> str:
    model = reading.model
    kept = min(keep_k, model.num_tokens)
    pairs = workbench.reconstruct(reading, [kept - 1, kept] if kept > 1 else [kept], sampling)
    shown = pairs[-1]
    side, name = model.image_size, escape(reading.encoded.keys[0])
    bits = kept * model.bits_per_token
    facts = {
        "Tokens": (str(kept), f"of {model.num_tokens}"),
        "Bits": (f"{bits:,.1f}", f"{kept} × {model.bits_per_token:.2f}"),
        "Bits per pixel": (f"{bits / side**2:.3f}", f"of {side} × {side}"),
        "PSNR": (f"{shown.psnr:.2f} dB", "of this square"),
    }
    figures = [
        _figure("image", to_pil(reading.square[0]), "As the model reads it", f"{name}, {side} × {side} pixels"),
        _figure("reconstruction", _picture(shown), "Reconstruction", f"from {tokens_label(kept)}"),
        _change_figure(pairs),
    ]
    return (
        f"<article class='ft-card'><h3>{escape(model.name)}</h3>"
        f"<dl class='ft-facts'>{''.join(_fact(name, *values) for name, values in facts.items())}</dl>"
        f"<div class='ft-figures'>{''.join(figures)}</div>"
        f"<div class='ft-inside'>{_mask(reading, kept)}{_token_ids(reading, kept)}</div></article>"
    )


def _change_figure(pairs: Sequence[Reconstruction]) -> str:
    shown = pairs[-1]
    title = f"What token {shown.keep_k} changed"
    if len(pairs) == 1:
        nothing = "<div class='ft-none'>nothing to compare with</div>"
        return f"<figure class='ft-change'>{nothing}{_caption(title, 'it is the first')}</figure>"
    amount = change(pairs[0].image, shown.image)
    note = f"on average {amount.float().mean():.1f} of 255, {shown.psnr - pairs[0].psnr:+.2f} dB"
    return _figure("change", draw_change(amount), title, note)


def _mask(reading: Reading, kept: int) -> str:
    model = reading.model
    layout = decoder_layout(model.model, reading.encoded, kept)
    if layout is None:
        return "<div class='ft-mask'><h4>Mask of the decoder</h4><p>It packs no row, so it has no mask.</p></div>"
    mask = full_mask(layout, num_tokens=model.num_tokens, keep_k=kept)
    num_patches = len(mask) - model.num_tokens
    picture = draw_mask(mask, [num_patches, num_patches + kept])
    words = "".join(
        f"<li><i style='background:{MASK_COLORS[code]}'></i>{_MASK_WORDS[code]}</li>"
        for code in (ATTENDS, ATTENDS_MASK_TOKEN, HIDDEN)
        if bool((mask == code).any())
    )
    dropped = model.num_tokens - kept
    row = ", ".join([f"{num_patches} patches", tokens_label(kept), *([f"{dropped} dropped"] if dropped else [])])
    return (
        "<div class='ft-mask'><h4>Mask of the decoder</h4>"
        f"<img src='{data_uri(picture)}' alt='mask of the decoder with {tokens_label(kept)}'>"
        f"<p>Each row attends to columns: {row}.</p><ul>{words}</ul></div>"
    )


def _token_ids(reading: Reading, kept: int) -> str:
    ids = "".join(
        f"<span class='{'ft-kept' if place < kept else 'ft-dropped'}'>{token}</span>"
        for place, token in enumerate(reading.token_ids)
    )
    return f"<div class='ft-ids'><h4>Token ids</h4><div>{ids}</div></div>"


def _strip(workbench: Workbench, reading: Reading, sampling: Sampling) -> list[str]:
    model = reading.model
    made = workbench.reconstruct(reading, default_keep_ks(model.num_tokens), sampling)
    side = f"{model.image_size} × {model.image_size}"
    cells = [_column(to_pil(reading.square[0]), "The image", side)]
    for before, shown in zip([None, *made], made, strict=False):
        change_of_it = None if before is None else draw_change(change(before.image, shown.image))
        note = f"{shown.keep_k * model.bits_per_token:,.0f} bits<br>{shown.psnr:.1f} dB"
        cells.append(_column(_picture(shown), tokens_label(shown.keep_k), note, below=change_of_it))
    return cells


def _column(picture: Image.Image, title: str, note: str, *, below: Image.Image | None = None) -> str:
    last = "" if below is None else _image(below, f"what changed up to {title}")
    return f"<figure>{_image(picture, title)}{_caption(title, note)}{last}</figure>"


def _figure(name: str, picture: Image.Image, title: str, note: str) -> str:
    return f"<figure class='ft-{name}'>{_image(picture, title)}{_caption(title, note)}</figure>"


def _caption(title: str, note: str) -> str:
    return f"<figcaption><b>{title}</b><span>{note}</span></figcaption>"


def _image(picture: Image.Image, alt: str) -> str:
    pixels = " class='ft-pixels'" if max(picture.size) <= _SMALL_SIDE else ""
    return f"<img{pixels} src='{data_uri(picture)}' alt='{alt}'>"


def _picture(shown: Reconstruction) -> Image.Image:
    return Image.fromarray(shown.image.permute(1, 2, 0).numpy())


def _fact(name: str, value: str, note: str) -> str:
    return f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
