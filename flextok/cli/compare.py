"""Compare evaluations of the same images.

  flextok compare runs/digits/2025-01-31_12-00-00 runs/digits/2025-02-01_09-30-00
  flextok compare my_tokenizer other_tokenizer --out comparison.html

A RUN is a run, an exported folder, or the folder that eval.py wrote. All are compared with the first, at every point
(keep_k, steps, guidance) that both have, image by image: the intervals are those of a paired bootstrap. The table is
printed, and written as a page with figures and, beside it, as JSON.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="two or more that eval.py has judged")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.html"), help="page to write (default: comparison.html)"
    )


def run(args: argparse.Namespace) -> int:
    from flextok.evaluation.compare import compare, write_json
    from flextok.evaluation.evaluated import read_evaluation
    from flextok.evaluation.html_compare import format_comparison, write_comparison

    if args.out.suffix != ".html":
        raise ValueError(f"--out {args.out}: valid is a name that ends in .html; the numbers go beside it as .json")
    runs = [read_evaluation(path) for path in args.runs]
    comparison = compare(runs)
    write_comparison(comparison, runs, args.out)
    write_json(comparison, args.out.with_suffix(".json"))
    print(f"{format_comparison(comparison)}\nreport: {args.out}")
    return 0
