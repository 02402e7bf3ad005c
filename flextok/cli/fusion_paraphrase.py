"""Let a language model reword the questions of a data set, for fusion of their answers.

  flextok fusion-paraphrase OUT.jsonl fusion/data=webqa --model my_model
  flextok fusion-paraphrase OUT.jsonl fusion/data=jsonl fusion.data.path=my_questions.jsonl --model my_model

OUT holds the first wording of each question and one new wording per round, as JSON lines that fusion/data=webqa and
fusion/data=jsonl take as fusion.data.path. After an interruption the same command goes on.
Overrides stand before the options.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="JSON lines to write, or to go on with")
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="the data set: overrides of the fuse config")
    parser.add_argument(
        "--model", required=True, help="a causal language model: folder, name on the hub or embedded:NAME"
    )
    parser.add_argument("--rounds", type=int, default=5, help="new wordings per question, at most 5 (default: 5)")
    parser.add_argument("--examples", type=int, default=4, help="shown in each prompt, at most 4 (default: 4)")
    parser.add_argument("--temperature", type=float, default=1.5, help="of the sampling (default: 1.5)")
    parser.add_argument("--top-p", type=float, default=0.9, help="of the sampling (default: 0.9)")
    parser.add_argument("--max-new-tokens", type=int, default=30, help="length of a wording (default: 30)")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first questions")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--device", default="auto", help="auto (the first accelerator, else the CPU), cpu, cuda, ...")


def run(args: argparse.Namespace) -> int:
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf.errors import OmegaConfBaseException
    from tqdm import tqdm

    from flextok.config import compose, describe_error
    from flextok.evaluation.device import pick_device
    from flextok.fusion.language_model import load_language_model
    from flextok.fusion.rewording import Rewriter, write_rewordings

    if args.out.suffix != ".jsonl":
        raise ValueError(f"OUT={args.out}: valid is a name that ends in .jsonl")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}: it must be at least 1")
    try:
        source = instantiate(compose(args.overrides, "fuse").fusion.data, _convert_="all")
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(describe_error(error)) from error
    items = source.test_items()[: args.limit]
    model, tokenizer = load_language_model(args.model, device=pick_device(args.device, field="--device"))
    rewriter = Rewriter(
        model,
        tokenizer,
        num_rounds=args.rounds,
        num_examples=args.examples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    with tqdm(total=len(items), unit="question") as bar:
        done = write_rewordings(args.out, items, rewriter, model_name=args.model, report=bar.update)
    print(f"{args.out}: {len(items)} questions, {done} of them now")
    return 0
