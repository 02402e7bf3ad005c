"""Fill the lemmas of a file of results, and print how many predictions are right.

  flextok fusion-lemmatize results/fusion-5.feather
  flextok fusion-lemmatize results/fusion-5.feather --lemmatizer spacy

`exact`: the lemmas of the prediction are those of a right answer; `contains`: those of a right answer are a contiguous
part of them. The file is written anew with the lemmas, and with the name of the lemmatiser in its run_config. spaCy
needs pip install 'flextok[lemmas]' and python -m spacy download en_core_web_lg.
"""

import argparse
from pathlib import Path

from flextok.fusion.lemmas import LEMMATIZERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a file of results, .feather or .parquet")
    parser.add_argument("--lemmatizer", choices=LEMMATIZERS, default="simple", help="default: simple")


def run(args: argparse.Namespace) -> int:
    from flextok.fusion.lemmas import add_lemmas, make_lemmatizer
    from flextok.fusion.matching import lemma_match
    from flextok.fusion.results import read_results, read_run_config, write_results

    lemmatizer = make_lemmatizer(args.lemmatizer)
    rows = add_lemmas(read_results(args.file), lemmatizer)
    run_config = (read_run_config(args.file) or {}) | {"lemmatizer": lemmatizer.name}
    write_results(args.file, rows, run_config, overwrite=True)
    print(f"{args.file}: {len(rows)} rows, lemmatizer {lemmatizer.name}")
    for mode in ("exact", "contains"):
        right = sum(lemma_match(row["predict_lemma"], row["answer_lemmas"], mode) for row in rows)
        print(f"{mode:<9} {f'{right / len(rows):.4f}  ({right} of {len(rows)})' if rows else 'no rows'}")
    return 0
