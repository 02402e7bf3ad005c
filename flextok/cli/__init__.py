"""Commands: `python -m flextok <command>`, also installed as `flextok`.

A command is a module of this package with `add_arguments(parser)` and `run(args) -> int`, and a line in
`COMMANDS`. Only the module of the command that was asked for is imported, so that `--help` does not wait for
torch.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from flextok import __version__

# Command -> what `--help` says about it. The module is the name with underscores: `show-mask` lives in
# `show_mask.py`.
COMMANDS = {
    "compare": "compare evaluations of the same images, with confidence intervals",
    "completion": "print a script that completes these commands in a shell",
    "demo": "try models in the browser: an image, a slider over its tokens, what comes back",
    "describe": "print every module of a model: keys it reads and writes, parameters, shapes",
    "detokenize": "turn tokens back into images",
    "export": "write a trained model as model.safetensors and config.json",
    "fuse": "answer questions that come in several wordings, by fusion or what it is compared with",
    "fusion-compare": "compare ways to answer the same questions, with confidence intervals",
    "fusion-inspect": "show how one question is read in several wordings: prompt, mask, attention, answer",
    "fusion-lemmatize": "fill the lemmas of a file of answers, and print how many are right",
    "fusion-paraphrase": "let a language model reword questions",
    "latents": "encode a data set with the VAE once, so that training need not",
    "needle-text": "write a text of facts on which a language model learns to look facts up",
    "prepare": "turn a folder of images or tar files into shards that training can stream",
    "reconstruct": "show an image and its reconstructions from more and more tokens",
    "show-mask": "show which tokens of a model attend to which, as text and as a picture",
    "sparse-eval": "measure perplexity, needles found and speed of a language model under sparse attention",
    "tokenize": "write the tokens of a folder of images or of tar files",
    "train-hash": "learn the hash projections of sparse attention from the queries and keys of a model",
    "train-lm": "train a small language model on texts or on questions and answers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 if all went well, 1 for an error that the user can
    mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(next((word for word in argv if word in COMMANDS), "")).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        status: int = args.run(args)
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


def build_parser(*chosen: str) -> argparse.ArgumentParser:
    """All commands, and the options of those chosen."""
    parser = argparse.ArgumentParser(prog="flextok", description="Flexible-length 1D image tokenizers.")
    parser.add_argument("--version", action="version", version=f"flextok {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, description=summary
        )
        if name in chosen:
            module = import_module(f"flextok.cli.{name.replace('-', '_')}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
