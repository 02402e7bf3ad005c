"""Measure what sparse attention costs a language model and saves: perplexity, needles found, speed of decoding.

  flextok needle-text needles.txt
  flextok needle-text needles_test.txt --passages 300 --seed 1
  flextok train-lm needles.txt --out needle_lm
  flextok sparse-eval needle_lm --text needles_test.txt --out sparse_eval

MODEL is a causal language model. Every preset is measured at every density, and a file with a list of maskers
([{"type": "SinkMasker", "sink_size": 4}, ...], JSON or YAML) once; beside them the dense model. The folder gets
results.json and results.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

PRESETS = ("sink_local", "oracle_top_k", "magicpig", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, name on the hub or embedded:NAME")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="for perplexity and as haystack")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("sparse_eval"), help="(%(default)s)")
    parser.add_argument(
        "--maskers",
        metavar="M",
        nargs="+",
        default=PRESETS,
        help="sink_local, oracle_top_k, hash, magicpig, random, vattention, or files (default: %(default)s)",
    )
    parser.add_argument("--hat-weights", metavar="FILE", help="of hash: what train-hash wrote")
    parser.add_argument("--densities", metavar="D", nargs="+", type=float, default=(0.1, 0.2, 0.4), help="%(default)s")
    parser.add_argument("--context", type=int, help="tokens of a window for perplexity (default: the model's)")
    parser.add_argument("--windows", type=int, default=32, help="such windows, at most (%(default)s)")
    parser.add_argument("--lengths", metavar="N", nargs="+", type=int, help="texts with needles (default: the model's)")
    parser.add_argument(
        "--depths", metavar="D", nargs="+", type=float, default=(0.0, 0.25, 0.5, 0.75, 1.0), help="%(default)s"
    )
    parser.add_argument("--needles", type=int, default=32, help="per length and depth; 0 for none (%(default)s)")
    parser.add_argument(
        "--needle",
        metavar="TEMPLATE",
        default=None,
        help="such as 'The word of {key} is {value}. '; the default is that of needle-text",
    )
    parser.add_argument(
        "--decode-lengths", metavar="N", nargs="*", type=int, default=(), help="measure speed after so many tokens"
    )
    parser.add_argument("--dense-prefill", action="store_true", help="read texts with needles densely")
    parser.add_argument("--seed", type=int, default=0, help="of the needles (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (the first accelerator, else the CPU), cpu, cuda, ...")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from flextok.evaluation.device import pick_device
    from flextok.fusion.language_model import load_language_model
    from flextok.sparse_lm.needles import TEMPLATE
    from flextok.sparse_lm.sweep import SweepSettings, draw, format_table, sweep

    points = [point for name in args.maskers for point in _points(name, args)]
    text = _read(args.text, "--text")
    model, tokenizer = load_language_model(args.model, device=pick_device(args.device, field="--device"))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 2048)
    settings = SweepSettings(
        context=args.context or min(context, 2048),
        windows=args.windows,
        lengths=args.lengths or [min(context, 2048)],
        depths=args.depths,
        needles=args.needles,
        template=args.needle or TEMPLATE,
        decode_lengths=args.decode_lengths,
        dense_prefill=args.dense_prefill,
        seed=args.seed,
    )
    with tqdm(total=settings.num_steps * (1 + len(points))) as bar:
        report = sweep(model, tokenizer, text, points, settings, bar.update)
    report["protocol"] |= {"model": args.model, "text": args.text.name}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report).savefig(args.out / "results.png", dpi=110)
    print(format_table(report))
    print(f"{args.out}/results.json, results.png; guessing finds {100 * report['protocol']['chance']:.1f} % of needles")
    return 0


def _points(name: str, args: argparse.Namespace) -> list[tuple[str, float, Any]]:
    """Of a preset one point per density, of a file one."""
    from flextok.attention.sparse import build_config
    from flextok.sparse_lm.dials import dial

    if Path(name).suffix in (".json", ".yaml", ".yml"):
        import yaml

        try:
            specs = yaml.safe_load(_read(Path(name), "--maskers"))
        except yaml.YAMLError as error:
            raise ValueError(f"--maskers {name}: {error}") from error
        build_config(specs)
        return [(Path(name).stem, 0.0, lambda _: specs)]

    def specs_at(density: float) -> Any:
        return lambda length: dial(name, density, length, hat_weight_file=args.hat_weights)

    for density in args.densities:
        # Before the model is loaded: a wrong name or density, a bad file of weights.
        build_config(specs_at(density)(1000))
    return [(name, density, specs_at(density)) for density in args.densities]


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8 text: {error}") from error
