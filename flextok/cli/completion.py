"""Print a script with which a shell completes commands, options and file names of `flextok`.

  flextok completion bash > ~/.local/share/bash-completion/completions/flextok
  flextok completion zsh > ~/.zfunc/_flextok                    a folder of $fpath
  flextok completion fish > ~/.config/fish/completions/flextok.fish

The script holds everything it completes, so no Python starts when you press TAB; print it again after an update.
Printing it needs the library shtab: pip install 'flextok[completion]'.
"""

import argparse
from pathlib import Path

from flextok.cli import COMMANDS, build_parser

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")


def run(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise ImportError("completion needs the library shtab: pip install 'flextok[completion]'") from error

    parser = build_parser(*COMMANDS)
    for name, command in _commands(parser).items():
        # Shells show it beside the name, where the text of `--help` is too long.
        command.description = COMMANDS[name]
        for action in command._actions:
            if action.choices is None and action.nargs != 0 and action.type in (None, Path):
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # What shtab looks for.
    print(shtab.complete(parser, args.shell))
    return 0


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction))
