"""Try models in the browser: drop an image, choose how many tokens are kept, see what comes back and what it costs.

  flextok demo                                                the small model that comes with the package
  flextok demo --checkpoint runs/photos/2025-01-31_12-00-00 my_tokenizer          models side by side
  flextok demo --checkpoint my_tokenizer --steps 25 --guidance-scale 7.5

It serves this machine alone unless --host says otherwise, until Ctrl-C.
"""

import argparse
import logging
import os
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flextok.cli.loaded_model import check_at_least, image_size_of, load_model

if TYPE_CHECKING:
    from flextok.demo.workbench import Workbench

DEFAULT_CHECKPOINTS = ("embedded:photos",)
# Reconstructions that are kept for sliders that come back to them: 50 MB at 256 x 256 pixels.
MAX_REMEMBERED = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="MODEL",
        nargs="+",
        default=list(DEFAULT_CHECKPOINTS),
        help="one or more: a run folder, a .ckpt in one, an exported folder, a .safetensors file, latest, "
        f"or embedded:digits (default: {' '.join(DEFAULT_CHECKPOINTS)})",
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged (default) or of the last step"
    )
    parser.add_argument("--device", default="auto", help="auto (the first accelerator, else the CPU), cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="for what is drawn for each image (default: 0)")
    parser.add_argument("--steps", type=int, default=2, help="steps of the decoder, to begin with (default: 2)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="to begin with; 1.0, the default, is none")
    parser.add_argument(
        "--perform-norm-guidance", action="store_true", help="begin with adaptive projected guidance, not the plain one"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--max-file-mb", type=int, default=10, help="megabytes of an image at most (default: 10)")
    parser.add_argument(
        "--max-waiting", type=int, default=32, help="requests that may wait, of all visitors (default: 32)"
    )


def run(args: argparse.Namespace) -> int:
    check_at_least(args, seed=0, port=1, max_file_mb=1, max_waiting=1)
    if args.port > 65535:
        raise ValueError(f"--port is {args.port}: valid are 1 to 65535")
    if find_spec("gradio") is None:
        raise ImportError("the demo needs gradio: pip install 'flextok[demo]'")
    workbench = load_workbench(args)

    from flextok.demo.app import build_app
    from flextok.demo.server import Limits, launch
    from flextok.demo.workbench import Sampling

    sampling = Sampling(
        timesteps=args.steps, guidance_scale=args.guidance_scale, perform_norm_guidance=args.perform_norm_guidance
    )
    limits = Limits(max_file_bytes=args.max_file_mb * 2**20, max_waiting=args.max_waiting)
    # Gradio asks itself whether it is there, and httpx says so.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Gradio would keep uploads where everybody on the machine may look, and some of them after the end.
    with TemporaryDirectory(prefix="flextok_demo_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        app = build_app(workbench, sampling=sampling, limits=limits)
        address = launch(app, host=args.host, port=args.port, limits=limits)
        print(f"-> {address}  (Ctrl-C ends it)", flush=True)
        app.block_thread()
    return 0


def load_workbench(args: argparse.Namespace) -> "Workbench":
    """The models that `--checkpoint` names, in its order; ValueError names the one that cannot be loaded."""
    from flextok.demo.workbench import DemoModel, Workbench

    models = []
    for name in args.checkpoint:
        try:
            model = load_model(argparse.Namespace(checkpoint=name, device=args.device, weights=args.weights))
            models.append(DemoModel(name, model, image_size_of(model, None)))
        except (ValueError, OSError) as error:
            raise ValueError(f"--checkpoint {name}: {error}") from error
    return Workbench(models, seed=args.seed, max_remembered=MAX_REMEMBERED)
