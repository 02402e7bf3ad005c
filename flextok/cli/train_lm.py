"""Train a small causal language model from scratch, on text files or on questions as JSON lines.

  flextok train-lm my_text.txt --out my_lm --steps 500 --valid my_other_text.txt
  flextok train-lm my_questions.jsonl --out my_lm --layers 2 --width 64

A line of a .jsonl file has the fields uuid, answers and paraphrases; each wording is an example,
"Q: {wording}\\nA: {first answer}\\n". FOLDER is then one for AutoModelForCausalLM and AutoTokenizer of
transformers. After an interruption the same command goes on. embedded:questions/train.jsonl comes with the package.
"""

import argparse
from pathlib import Path

from flextok.cli.setting_options import add_setting_options, read_settings
from flextok.embedded import embedded_file
from flextok.training.language_settings import LanguageModelSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="DATA", nargs="+", type=embedded_file, help="text files, or .jsonl files of questions"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="to write into, or to go on with")
    parser.add_argument(
        "--valid", metavar="FILE", nargs="+", type=embedded_file, default=(), help="to measure perplexity on"
    )
    add_setting_options(parser, LanguageModelSettings)
    parser.add_argument(
        "--save-every", type=int, default=100, help="steps from one checkpoint to the next (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto (the first accelerator, else the CPU), cpu, cuda, ...")


def run(args: argparse.Namespace) -> int:
    from flextok.evaluation.device import pick_device
    from flextok.training.language_model import train_language_model

    if args.save_every < 1:
        raise ValueError(f"--save-every is {args.save_every}: it must be at least 1")
    settings = read_settings(args, LanguageModelSettings)
    record = train_language_model(
        args.data,
        args.out,
        settings,
        valid=args.valid,
        device=pick_device(args.device, field="--device"),
        save_every=args.save_every,
    )
    print(f"{args.out}: {record['parameters']:,} parameters, loss {record['losses'][-1][1]:.4f}")
    if "valid" in record:
        valid = record["valid"]
        print(f"held out: loss {valid['loss']:.4f}, perplexity {valid['perplexity']:.2f}, of {valid['tokens']} tokens")
    return 0
