"""Answer questions that come in several wordings, by fusion of the wordings or by what it is compared with.

  flextok fuse                                                        questions and a small model that come along
  flextok fuse fusion.method=avg fusion.num_paraphrases=3 fusion.limit=100
  flextok fuse fusion/data=webqa fusion.model=my_model fusion.dtype=bfloat16 fusion.batch_size=8
  flextok fuse fusion.method=per_prompt fusion.confidence_samples=100
  flextok fuse fusion.method=weighted_avg fusion.weights=results/per_prompt-5.feather

Answers go into fusion.out, as {method}-{num_paraphrases}.feather, or with the numbers of the wordings for
fusion.indices. After an interruption the same command goes on. configs/fusion/default.yaml lists all options.
"""

import argparse

from flextok.cli.fusion_settings import add_override_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from flextok.cli.fusion_questions import read_questions, read_weights
    from flextok.cli.fusion_run import answer_with_progress, result_path
    from flextok.cli.fusion_scores import summary_line
    from flextok.cli.fusion_settings import read_settings

    settings = read_settings(args.overrides)
    questions = read_questions(settings)
    answers = answer_with_progress(settings, questions, read_weights(settings, questions))
    print(f"{result_path(settings)}: {summary_line(answers)}")
    return 0
