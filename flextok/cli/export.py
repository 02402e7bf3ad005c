"""Write a trained model in the published form.

  flextok export runs/digits/2025-01-31_12-00-00 my_tokenizer
  flextok export runs/digits/2025-01-31_12-00-00/checkpoints/last.ckpt my_tokenizer --weights raw

The folder then holds model.safetensors (weights and config) and config.json:
`FlexTokFromHub.from_pretrained("my_tokenizer")` loads it, and so does
`load_model_from_safetensors("my_tokenizer/model.safetensors")`.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_ckpt", metavar="RUN_OR_CKPT", type=Path, help="folder of a run, or a .ckpt in one")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write into; made if need be")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="the averaged weights where the run has them (default), or those of the last step",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in OUT_DIR already")


def run(args: argparse.Namespace) -> int:
    from flextok.training.checkpoints import load_run
    from flextok.utils.export import export_model

    if not args.run_or_ckpt.exists():
        raise FileNotFoundError(f"RUN_OR_CKPT: {args.run_or_ckpt} does not exist; give a run folder or a .ckpt in one")
    model, config = load_run(args.run_or_ckpt, weights=args.weights)
    # A run's config holds much besides the model; the model's own has its parts at the top.
    model_config = config.model if "model" in config else config
    out_dir = export_model(model, model_config, args.out_dir, overwrite=args.overwrite)
    print(f"{args.run_or_ckpt} -> {out_dir}")
    return 0
