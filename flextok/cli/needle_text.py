"""Write a text of made-up facts that are stated and repeated: a model trained on it learns to look facts up.

  flextok needle-text needles.txt --passages 10000
  flextok needle-text needles_valid.txt --passages 200 --seed 1

For train-lm, and for sparse-eval, whose needles have the same form.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT.txt", type=Path, help="to write")
    parser.add_argument("--passages", type=int, default=10000, help="of 2 to 12 facts each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one for a text to test with (%(default)s)")


def run(args: argparse.Namespace) -> int:
    from flextok.cli.loaded_model import check_at_least
    from flextok.sparse_lm.needles import needle_text

    check_at_least(args, passages=1)
    args.out.write_text(needle_text(args.passages, args.seed), encoding="utf-8")
    print(f"{args.out}: {args.passages} passages")
    return 0
