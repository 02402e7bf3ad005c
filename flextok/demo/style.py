"""How the page looks. Colours are Gradio's own where they can be, so that they follow light and dark mode."""

import gradio as gr

CSS = """
.gradio-container {max-width: 1500px !important; margin: 0 auto !important}
.ft-head h1 {font-size: 1.7rem; margin: 0 0 2px; font-weight: 700}
.ft-head p {margin: 0; color: var(--body-text-color-subdued); max-width: 80ch}
.ft-note {color: var(--body-text-color-subdued); font-size: .85rem; margin: 0 0 10px}
.ft-welcome {border: 1px dashed var(--border-color-primary); border-radius: 10px; padding: 90px 24px;
  text-align: center; color: var(--body-text-color-subdued)}
.ft-message {border: 1px solid #e5b4b0; border-left: 4px solid #c0392b; background: #fdf3f2; color: #7b1e15;
  border-radius: 8px; padding: 10px 14px; overflow-wrap: anywhere}
.ft-cards {display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr))}
.ft-card, .ft-gallery {background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 10px; padding: 14px 16px 16px}
.ft-card h3, .ft-gallery h3 {margin: 0 0 10px; font-size: 1.05rem; font-weight: 650; overflow-wrap: anywhere}
.ft-card h4, .ft-gallery h4 {margin: 0 0 6px; font-size: .85rem; font-weight: 600; overflow-wrap: anywhere}
.ft-facts {display: grid; grid-template-columns: repeat(4, auto); gap: 4px 14px; margin: 0 0 12px}
.ft-facts dt {font-size: .75rem; color: var(--body-text-color-subdued)}
.ft-facts dd {margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums}
.ft-facts small {display: block; font-size: .78rem; font-weight: 400; color: var(--body-text-color-subdued)}
.ft-figures {display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px}
.ft-card figure, .ft-gallery figure {margin: 0}
.ft-card img, .ft-gallery img, .ft-none {width: 100%; aspect-ratio: 1; display: block; border-radius: 6px;
  border: 1px solid var(--border-color-primary); box-sizing: border-box}
.ft-pixels {image-rendering: pixelated}
.ft-none {display: grid; place-items: center; font-size: .8rem; color: var(--body-text-color-subdued)}
.ft-card figcaption, .ft-gallery figcaption {font-size: .8rem; line-height: 1.3; padding-top: 5px}
.ft-card figcaption b, .ft-gallery figcaption b {display: block; font-weight: 600}
.ft-card figcaption span, .ft-gallery figcaption span {color: var(--body-text-color-subdued);
  overflow-wrap: anywhere}
.ft-inside {display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2fr); gap: 10px 18px; margin-top: 16px}
.ft-mask img {max-width: 210px}
.ft-mask p, .ft-mask ul {font-size: .78rem; line-height: 1.35; margin: 5px 0 0; padding: 0; list-style: none;
  color: var(--body-text-color-subdued)}
.ft-mask li {margin: 0; padding: 0; color: inherit}
.ft-mask i, .ft-scale {display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px}
.ft-scale {width: 70px; margin: 0 4px;
  background: linear-gradient(90deg, #ffffff, #fcc584, #d94841, #5c103e); border: 1px solid var(--border-color-primary)}
.ft-ids div {display: flex; flex-wrap: wrap; gap: 4px; max-height: 260px; overflow-y: auto}
.ft-ids span {font: .74rem/1 ui-monospace, Consolas, monospace; padding: 4px 6px; border-radius: 4px;
  background: #1f4e79; color: #fff}
.ft-ids span.ft-dropped {background: transparent; color: var(--body-text-color-subdued);
  box-shadow: inset 0 0 0 1px var(--border-color-primary)}
.ft-gallery {margin-top: 0}
.ft-strip {display: grid; grid-auto-flow: column; grid-auto-columns: minmax(76px, 1fr); gap: 8px; overflow-x: auto;
  margin-bottom: 14px; padding-bottom: 4px}
.ft-strip figcaption + img {margin-top: 8px}
.ft-examples {display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 6px}
.ft-examples button {padding: 0; border: 0; background: none; cursor: pointer; border-radius: 6px}
.ft-examples img {width: 100%; aspect-ratio: 1; display: block; border-radius: 6px; margin: 0}
.ft-examples button:hover img, .ft-examples button:focus-visible img {outline: 2px solid var(--color-accent)}
#examples h4 {margin: 0 0 6px; font-size: .85rem; font-weight: 600}
#examples .ft-note {margin: 8px 0 0}
.gradio-container .html-container {padding: 0 !important}
/* Wide strips scroll, and do not widen the page. */
#gallery {contain: inline-size}
#message:not(:has(.ft-message)) {display: none}
#keep_k {position: sticky; top: 8px; z-index: 5; box-shadow: 0 1px 6px rgb(0 0 0 / .08)}
"""


def theme() -> gr.themes.Base:
    """Gradio's own with the fonts of the machine: others would be fetched."""
    plain = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
    )
    # Gradio's grey is too pale to be read on white.
    return plain.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")
