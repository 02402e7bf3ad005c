"""How long does it take until something happens? `python -m benchmarks.start_up`

Medians over whole processes, run in turn, and which heavy packages each of them loads.
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.command import parse, parser, write
from benchmarks.harness import measure_in_turn, print_table

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {
    "import torch": ("-c", "import torch"),
    "import flextok": ("-c", "import flextok"),
    "from flextok import FlexTok, FlexTokFromHub": ("-c", "from flextok import FlexTok, FlexTokFromHub"),
    "train.py --help": ("train.py", "--help"),
}
HEAVY = (
    *("torch", "lightning", "wandb", "matplotlib", "transformers", "diffusers", "torchmetrics", "hydra", "sklearn"),
    *("skimage", "huggingface_hub", "sympy", "torch._dynamo", "torch._inductor"),
)
"""Packages that take a noticeable part of a second to load."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(parser("start_up", __doc__, repeats=5), arguments)
    runs = {name: partial(run, *command) for name, command in COMMANDS.items()}
    seconds = measure_in_turn(runs, repeats=options.repeats, warmup=1, device=torch.device("cpu"))
    loads = {name: heavy_packages(*command) for name, command in COMMANDS.items()}
    times = {name: {"median_seconds": median(seconds[name])} for name in COMMANDS}
    print_table([{"what": name, **times[name], "loads": " ".join(loads[name])} for name in COMMANDS])
    rows = [{"what": name, **times[name], "loads": loads[name], "seconds": seconds[name]} for name in COMMANDS]
    write(options, {"rows": rows})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end; an error is ours."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)


def heavy_packages(*arguments: str) -> list[str]:
    """Those of `HEAVY` that a command loads, found in the import times Python reports."""
    lines = run("-X", "importtime", *arguments).stderr.splitlines()
    loaded = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    return [package for package in HEAVY if package in loaded]


if __name__ == "__main__":
    main()
