"""What the commands share: their options and where their results go."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, write_results

RESULTS = Path(__file__).resolve().parent / "results"


def parser(name: str, description: str | None, *, repeats: int | None) -> argparse.ArgumentParser:
    """A parser with the options every command has; without `repeats` nothing is timed."""
    command = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=(description or "").split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", type=torch.device, default=torch.device(default))
    if repeats is not None:
        command.add_argument("--repeats", type=int, default=repeats, help=f"timed rounds, default {repeats}")
    command.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return command


def parse(command: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; None reads the command line."""
    options = command.parse_args(arguments)
    if getattr(options, "repeats", 1) < 1:
        command.error(f"--repeats {options.repeats}: at least 1")
    return options


def write(options: argparse.Namespace, content: dict[str, Any]) -> None:
    """Write what was found to `--out`, with the machine it was found on."""
    settings = {name: value for name, value in vars(options).items() if name in ("repeats",)}
    write_results(options.out, {"machine": machine(options.device), **settings, **content})
    print(f"written to {options.out}")
