"""Compare ways to answer the same questions: accuracy, agreement, tokens and seconds, side by side.

  flextok fusion-compare                                              questions and a small model that come along
  flextok fusion-compare fusion.limit=100 --methods origin,avg,max,fusion
  flextok fusion-compare --files results/fusion-5.feather results/avg-5.feather results/origin-5.feather

With overrides, which are those of `flextok fuse` and stand before the options, each method answers the questions first;
files that are there already are taken as they are, and an interrupted comparison goes on. Differences are to `origin`
where it is among them, else to the first, question by question; brackets hold 95 % intervals of the paired bootstrap
over the questions. fusion.weights goes to the methods that take weights, fusion.confidence_samples to per_prompt. The
table is printed, and written as JSON with a figure beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextok.cli.fusion_settings import add_override_arguments

if TYPE_CHECKING:
    from flextok.cli.fusion_scores import AnswerFile
    from flextok.cli.fusion_settings import FusionSettings

DEFAULT_METHODS = "origin,per_prompt,avg,max,fusion"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser)
    parser.add_argument("--methods", metavar="NAME,...", help=f"which (default: {DEFAULT_METHODS})")
    parser.add_argument("--files", metavar="FILE", type=Path, nargs="+", help="files of answers to compare instead")
    parser.add_argument(
        "--out", metavar="FILE.json", type=Path, help="default: comparison.json in fusion.out, or beside the first file"
    )


def run(args: argparse.Namespace) -> int:
    from flextok.cli.fusion_comparison import compare, format_comparison, write_comparison

    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"--out {args.out}: valid is a name that ends in .json; the figure goes beside it as .png")
    if args.files is None:
        settings = _settings_of(args.overrides, (args.methods or DEFAULT_METHODS).split(","))
        folder, files = Path(settings[0].out).expanduser(), _answered(settings)
    elif args.overrides or args.methods is not None:
        raise ValueError("--files takes files as they are; valid: without overrides and --methods")
    else:
        folder, files = args.files[0].parent, _read(args.files)
    out = args.out or folder / "comparison.json"
    comparison = compare(files)
    picture = write_comparison(comparison, out)
    print(f"{format_comparison(comparison)}\n-> {out}, {picture}")
    return 0


def _settings_of(overrides: Sequence[str], methods: Sequence[str]) -> "list[FusionSettings]":
    """Those of each method, without what it does not know."""
    from flextok.cli.fusion_settings import read_settings
    from flextok.fusion.methods import TAKES_WEIGHTS

    if any(override.partition("=")[0] == "fusion.method" for override in overrides):
        raise ValueError("fusion.method: this command runs several; valid: --methods NAME,NAME,...")
    if len(methods) < 2 or len({*methods}) < len(methods):
        raise ValueError(f"--methods {','.join(methods)}: valid are two or more, and each once")
    unused: dict[str, dict[str, Any]] = {
        method: ({} if method in TAKES_WEIGHTS else {"weights": None})
        | ({} if method == "per_prompt" else {"confidence_samples": 0})
        for method in methods
    }
    return [read_settings(overrides, method=method, **unused[method]) for method in methods]


def _answered(all_settings: "Sequence[FusionSettings]") -> "list[AnswerFile]":
    """The answers of each method, from its file if there is one."""
    from flextok.cli.fusion_questions import read_questions, read_weights
    from flextok.cli.fusion_run import answer_with_progress, finished_answers, load_answerer

    # What cannot be done shows before the first of them runs.
    questions = read_questions(all_settings[0])
    weights = [read_weights(settings, questions) for settings in all_settings]
    finished = [finished_answers(settings) for settings in all_settings]
    answerer = None
    files = []
    for settings, of_method, found in zip(all_settings, weights, finished, strict=True):
        if found is None:
            answerer = load_answerer(settings) if answerer is None else answerer.using(settings.method_options())
            found = answer_with_progress(settings, questions, of_method, answerer)
        files.append(found)
    return files


def _read(paths: Sequence[Path]) -> "list[AnswerFile]":
    from flextok.cli.fusion_scores import read_answer_file

    return [read_answer_file(path, name=name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """As short as tells them apart."""
    forms = [
        [path.stem for path in paths],
        [f"{path.parent.name}/{path.stem}" for path in paths],
        [str(path) for path in paths],
    ]
    return next((names for names in forms if len({*names}) == len(names)), forms[0])
