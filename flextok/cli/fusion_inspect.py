"""Show how one question is read in several wordings: the prompt, who attends to whom, the answer, and what it looks at.

  flextok fusion-inspect --item 3                                     questions and a small model that come along
  flextok fusion-inspect fusion/data=jsonl fusion.data.path=my_questions.jsonl fusion.model=my_model --item 0

Prints the prompt with the span of each part in tokens, the mask at the positions that say most, the answer, and how
much of its attention each part of the prompt gets: the mean over heads, layers and the tokens of the answer. Both are
written as pictures, too. Overrides are those of `flextok fuse`, and stand before the options.
"""

import argparse
from pathlib import Path

from flextok.cli.fusion_settings import add_override_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser)
    parser.add_argument("--item", metavar="N", type=int, default=0, help="which question, from 0 on (default: 0)")
    parser.add_argument(
        "--budget", metavar="N", type=int, default=25, help="positions shown as text at most (default: 25)"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="for mask.png and attention.png (default: item-N in fusion.out)"
    )


def run(args: argparse.Namespace) -> int:
    from flextok.attention.visualize import render_mask, save_mask_png
    from flextok.cli.fusion_inspection import describe_mass, describe_spans, inspect, save_mass_png
    from flextok.cli.fusion_questions import read_questions, read_weights
    from flextok.cli.fusion_run import load_answerer
    from flextok.cli.fusion_settings import read_settings

    settings = read_settings(args.overrides)
    if settings.method != "fusion":
        raise ValueError(f"fusion.method={settings.method}: only fusion puts wordings in one prompt; leave it out")
    if args.budget < 1:
        raise ValueError(f"--budget {args.budget}: valid is 1 position or more")
    questions = read_questions(settings)
    if not 0 <= args.item < len(questions):
        raise ValueError(f"--item {args.item}: valid are 0 to {len(questions) - 1}, the number of the question")
    weights = read_weights(settings, questions)
    question = questions.questions[args.item]
    found = inspect(
        load_answerer(settings),
        question.texts,
        None if weights is None else weights[question.item.uuid],
    )
    folder = Path(settings.out).expanduser() / f"item-{args.item}" if args.out is None else args.out
    spans = [span for _, span in found.parts]
    print(f"question {args.item}, uuid {question.item.uuid}\n\n{found.text}\n")
    print(describe_spans(found))
    print(render_mask(found.mask, spans, found.fusion_start, budget=args.budget))
    print(f"\nanswer {questions.style.prediction(found.answer)!r}, right: {', '.join(question.item.answers)}\n")
    print(describe_mass(found))
    names = [name for name, _ in found.parts]
    mask = save_mask_png(
        found.mask, folder / "mask.png", spans, found.fusion_start, names=names, title=f"question {args.item}"
    )
    print(f"-> {mask}, {save_mass_png(found, folder / 'attention.png')}")
    return 0
