"""Write a trained model in the published form.

  flextok export runs/digits/2025-01-31_12-00-00 my_tokenizer
  flextok export runs/digits/2025-01-31_12-00-00/checkpoints/last.ckpt my_tokenizer --weights raw

The folder then holds model.safetensors (weights and config), config.json and README.md, the card of the model:
`FlexTokFromHub.from_pretrained("my_tokenizer")` loads it, and so does
`load_model_from_safetensors("my_tokenizer/model.safetensors")`.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_ckpt", metavar="RUN_OR_CKPT", type=Path, help="folder of a run, or a .ckpt in one")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write into; made if need be")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="the averaged weights where the run has them (default), or those of the last step",
    )
    parser.add_argument(
        "--metrics", type=Path, help="metrics.json for the card; default: that of the run, if it is of these weights"
    )
    parser.add_argument("--license", help="licence of the weights, such as apache-2.0, for the card")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in OUT_DIR already")


def run(args: argparse.Namespace) -> int:
    from flextok.training.checkpoints import load_run
    from flextok.utils.checkpoint import atomic_path
    from flextok.utils.export import export_model
    from flextok.utils.model_card import model_card, read_metrics

    if not args.run_or_ckpt.exists():
        raise FileNotFoundError(f"RUN_OR_CKPT: {args.run_or_ckpt} does not exist; give a run folder or a .ckpt in one")
    model, config = load_run(args.run_or_ckpt, weights=args.weights)
    # A run's config holds much besides the model; the model's own has its parts at the top.
    model_config = config.model if "model" in config else config
    metrics = _metrics_of(model, args.run_or_ckpt) if args.metrics is None else read_metrics(args.metrics)
    card = args.out_dir / "README.md"
    if card.exists() and not args.overwrite:
        raise FileExistsError(f"{card} exists; choose another folder or allow overwriting")
    out_dir = export_model(model, model_config, args.out_dir, overwrite=args.overwrite)
    with atomic_path(card) as temporary:
        model_card(model, metrics=metrics, license=args.license).save(temporary)
    print(f"{args.run_or_ckpt} -> {out_dir}")
    return 0


def _metrics_of(model: Any, run_or_ckpt: Path) -> dict[str, Any] | None:
    """What was measured of just these weights, in the place where `eval.py` writes it."""
    from flextok.evaluation.source import find_source
    from flextok.provenance import weights_sha256
    from flextok.utils.model_card import read_metrics

    path = find_source(str(run_or_ckpt), runs=Path()).default_output_dir / "metrics.json"
    if not path.is_file():
        return None
    metrics = read_metrics(path)
    if metrics["protocol"].get("weights_sha256") == weights_sha256(model):
        return metrics
    logger.warning(
        "the card says nothing of %s: it is of other weights; python eval.py checkpoint=%s measures these",
        *(path, run_or_ckpt),
    )
    return None
