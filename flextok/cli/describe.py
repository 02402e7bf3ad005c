"""Print every module of a model in the order in which they run: what it reads, what it writes, how large it
is.

  flextok describe model=flextok_d12_d12 dropout=attention_mask    any overrides of configs/train.yaml
  flextok describe runs/digits/2025-01-31_12-00-00                 a run
  flextok describe my_tokenizer/model.safetensors                  a checkpoint, or its folder

Shapes are those of one sample. Nothing is computed and no weight is read, so the largest model takes seconds,
too.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flextok.cli.module_table import ModuleRow

_HEADER = ("module", "class", "reads", "writes", "parameters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="OVERRIDE|PATH",
        nargs="*",
        help="overrides of the training config, or one existing path",
    )
    parser.add_argument(
        "--trust", action="store_true", help="build whatever the config of a run names; only for runs of your own"
    )


def run(args: argparse.Namespace) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from flextok.cli.model_config import read_model_config
    from flextok.cli.module_table import trace_modules
    from flextok.config import describe_error

    try:
        rows = trace_modules(*read_model_config(args.what, trust=args.trust))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(describe_error(error)) from error
    print("\n".join(_format_table(rows)))
    print()
    for name, total in _totals(rows).items():
        print(f"{name:<8} {total:>15,} parameters")
    print("(without the VAE)")
    return 0


def _totals(rows: "Iterable[ModuleRow]") -> dict[str, int]:
    totals = {"encoder": 0, "decoder": 0, "all": 0}
    for row in rows:
        totals["all"] += row.num_parameters or 0
        if row.part in totals:
            totals[row.part] += row.num_parameters or 0
    return totals


def _format_table(rows: "Iterable[ModuleRow]") -> Iterator[str]:
    """Each module takes as many lines as it has keys to read or to write."""
    cells = [line for row in rows for line in _cells(row)]
    widths = [max(len(line[i]) for line in [_HEADER, *cells]) for i in range(len(_HEADER))]
    for line in [_HEADER, tuple("-" * width for width in widths), *cells]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _cells(row: "ModuleRow") -> Iterator[tuple[str, ...]]:
    # A key without a shape was not written in this pass, say because it is only written in training.
    writes = [f"{key} {row.shapes.get(key, '-')}" for key in row.writes]
    for i in range(max(1, len(row.reads), len(writes))):
        yield (
            row.name if i == 0 else "",
            row.class_name if i == 0 else "",
            row.reads[i] if i < len(row.reads) else "",
            writes[i] if i < len(writes) else "",
            "" if i or row.num_parameters is None else f"{row.num_parameters:,}",
        )
