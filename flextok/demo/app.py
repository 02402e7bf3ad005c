"""The demo as a Gradio app: what is where on the page, what happens on a click, and what a visitor may not do."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from PIL import Image

from flextok.data.photos import load_photo
from flextok.data.transforms import read_image, resize_shorter_center_crop
from flextok.demo import page
from flextok.demo.examples import available_examples
from flextok.demo.server import Limits
from flextok.demo.workbench import MAX_GUIDANCE, MAX_STEPS, Reading, Sampling, Workbench

# Seconds after which uploads are deleted, and between two looks at them.
_UPLOADS_KEPT, _UPLOADS_CHECKED = 600, 60
_THUMBNAIL = 128


def read_upload(upload: FileData) -> tuple[Image.Image, str]:
    """The image in a file that somebody dropped, and the name it had there.

    Raises:
        ValueError: It is no image that can be read; the message begins with its name.
    """
    name = Path(upload.orig_name or upload.path).name
    return read_image(Path(upload.path), name=name), name


def build_app(workbench: Workbench, *, sampling: Sampling, limits: Limits) -> gr.Blocks:
    """The page; `sampling` is what its settings begin with."""
    thumbnails = {name: resize_shorter_center_crop(load_photo(name), _THUMBNAIL) for name in available_examples()}

    def show_image(
        picture: Image.Image, name: str, keep_k: float, *settings: Any
    ) -> tuple[tuple[Reading, ...], str, str]:
        readings = workbench.read(picture, name)
        return readings, page.message(""), page.results(workbench, readings, int(keep_k), _sampling(*settings))

    def on_upload(upload: FileData | None, keep_k: float, *settings: Any) -> list[Any]:
        if upload is None:
            return [gr.skip()] * 4
        try:
            picture, name = read_upload(upload)
            return [None, *show_image(picture, name, keep_k, *settings)]
        except ValueError as error:
            # What was shown before stays, and the next file can be dropped at once.
            return [None, gr.skip(), page.message(str(error)), gr.skip()]

    def on_example(chosen: gr.EventData, keep_k: float, *settings: Any) -> Any:
        name = chosen._data.get("name")
        if name not in thumbnails:
            return [gr.skip()] * 3
        return show_image(load_photo(name), name, keep_k, *settings)

    def on_slider(readings: tuple[Reading, ...] | None, keep_k: float, *settings: Any) -> Any:
        if readings is None:
            return gr.skip()
        return page.results(workbench, readings, int(keep_k), _sampling(*settings))

    def on_gallery(readings: tuple[Reading, ...] | None, *settings: Any) -> Any:
        return gr.skip() if readings is None else page.gallery(workbench, readings, _sampling(*settings))

    with gr.Blocks(
        title="FlexTok", analytics_enabled=False, delete_cache=(_UPLOADS_CHECKED, _UPLOADS_KEPT), fill_width=True
    ) as app:
        gr.HTML(
            "<h1>How many tokens does an image need?</h1><p>A tokenizer turns an image into an ordered row of tokens. "
            "Any number of the first ones gives an image back; every further one adds detail.</p>",
            elem_classes="ft-head",
        )
        readings = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=260):
                megabytes = limits.max_file_bytes / 2**20
                drop = gr.File(
                    label=f"Image: JPEG, PNG or WebP, up to {megabytes:g} MB",
                    file_types=["image"],
                    height=150,
                    elem_id="drop",
                )
                _take_uploads_alone(drop)
                chooser = gr.HTML(page.examples(thumbnails), js_on_load=page.CHOOSE_EXAMPLE, elem_id="examples")
                with gr.Accordion("Settings of the decoder", open=False, elem_id="settings"):
                    settings = _settings(sampling)
            with gr.Column(scale=3, min_width=300):
                keep_k = gr.Slider(
                    1,
                    workbench.max_tokens,
                    value=max(1, workbench.max_tokens // 4),
                    step=1,
                    label="Tokens kept (keep_k)",
                    elem_id="keep_k",
                )
                message = gr.HTML(page.message(""), elem_id="message")
                result = gr.HTML(page.WELCOME, elem_id="result")
                strips = gr.HTML("", elem_id="gallery")

        # One at a time: the models share the machine, and waiting in line is what the queue is for.
        common: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "models", "concurrency_limit": 1}
        shown = [readings, message, result]
        after = {
            "fn": on_gallery,
            "inputs": [readings, *settings],
            "outputs": strips,
            "show_progress": "hidden",
        } | common
        drop.upload(on_upload, [drop, keep_k, *settings], [drop, *shown], **common).then(**after)
        chooser.click(on_example, [keep_k, *settings], shown, show_progress="hidden", **common).then(**after)
        # While one position of the slider is decoded, only the last of those that follow waits.
        live: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"} | common
        inputs = [readings, keep_k, *settings]
        keep_k.input(on_slider, inputs, result, **live)
        gr.on([setting.change for setting in settings], on_slider, inputs, result, **live).then(**after)
    app.queue(max_size=limits.max_waiting, default_concurrency_limit=1, api_open=False)
    return app


def _take_uploads_alone(drop: gr.File) -> None:
    """Files come as they were dropped, and from nowhere else.

    On the instance, because Gradio writes a stub beside the source of each class of components.
    """
    move = drop.async_move_resource_to_block_cache

    async def move_upload(place: Any) -> Any:
        # A request may name an address in place of an upload, and Gradio would go and get it, of any size.
        if str(place).lower().startswith(("http:", "https:")):
            raise gr.Error("only files are taken, no addresses", print_exception=False)
        return await move(place)

    drop.async_move_resource_to_block_cache = move_upload
    # Gradio's own gives no more than the path, and leaves an empty file behind for each.
    drop.preprocess = lambda payload: payload


def _settings(sampling: Sampling) -> list[Any]:
    return [
        gr.Slider(1, MAX_STEPS, value=sampling.timesteps, step=1, label="Steps"),
        gr.Slider(1.0, MAX_GUIDANCE, value=sampling.guidance_scale, step=0.5, label="Guidance (1 is none)"),
        gr.Checkbox(sampling.perform_norm_guidance, label="Adaptive projected guidance"),
    ]


def _sampling(steps: float, guidance_scale: float, perform_norm_guidance: bool) -> Sampling:
    try:
        return Sampling(
            timesteps=int(steps), guidance_scale=float(guidance_scale), perform_norm_guidance=perform_norm_guidance
        )
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
