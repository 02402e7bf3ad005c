"""Reading a configuration: its resolvers, composing it in Python, and how a mistake in it is reported."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from flextok.config_checks import check_config

__all__ = ["CONFIG_FOLDER", "check_config", "compose", "register_resolvers", "run_command"]

# Hydra makes the folder of a run before our own code runs, and cannot know how it is chosen.
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

_SHORT_ERRORS = "_FLEXTOK_SHORT_ERRORS"
CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def register_resolvers() -> None:
    """Teach OmegaConf the small arithmetic of our configs.

    `${mul:a,b,...}`, `${floordiv:a,b}`, `${len:list}`, `${float:x}`, and `${share:n,x}`, that share of n, at least 1.
    """
    OmegaConf.register_new_resolver("mul", _mul, replace=True)
    OmegaConf.register_new_resolver("floordiv", _floordiv, replace=True)
    OmegaConf.register_new_resolver("len", len, replace=True)
    OmegaConf.register_new_resolver("float", float, replace=True)
    OmegaConf.register_new_resolver("share", _share, replace=True)


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> DictConfig:
    """Compose `configs/<config_name>.yaml` as the command line would, for notebooks and tests.

    There is no Hydra run folder then: override `paths.run` before anything is written or resolved.
    """
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose(config_name, overrides=list(overrides))


def run_command(main: Callable[[], Any]) -> None:
    """Run a `hydra.main` function; what the user got wrong becomes one readable last line and exit code 2.

    `HYDRA_FULL_ERROR=1` brings the traceback back.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1" and _SHORT_ERRORS not in os.environ
    if not wants_traceback:
        # Without the first Hydra prints the exception itself, cause last, and we never see it. The second tells the
        # processes we start that it was not the user who asked.
        os.environ.update({"HYDRA_FULL_ERROR": "1", _SHORT_ERRORS: "1"})
    try:
        main()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        sys.stderr.write(f"(HYDRA_FULL_ERROR=1 shows the traceback)\nerror: {describe_error(error)}\n")
        sys.exit(2)


def describe_error(error: BaseException) -> str:
    """Return the messages of an error and its causes on one line, with a suggestion for a misspelt key."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        # An error of a data worker comes with its traceback, whose last line is the error itself.
        said = str(cause).partition("Original Traceback")
        text = " ".join((said[2].strip().splitlines()[-1] if said[2] else said[0]).split())
        if text and not any(text in message for message in messages):
            messages.append(text)
        if isinstance(cause, OmegaConfBaseException):
            messages.extend(_suggestion(cause))
        cause = cause.__cause__
    if any(text.startswith("Config group override must be") for text in messages):
        messages.append("to leave a group out write <group>=none, such as logger=none")
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        messages.append("where a run is written: hydra.run.dir=<folder> or paths.runs=<folder>")
    return " | ".join(messages) or type(error).__name__


def _suggestion(error: OmegaConfBaseException) -> list[str]:
    parent = error.parent_node
    if (
        isinstance(error, MissingMandatoryValue)
        or not isinstance(parent, DictConfig)
        or error.key is None
        or parent._is_none()
        or parent._is_missing()
    ):
        return []
    known = sorted(str(key) for key in parent)
    close = get_close_matches(str(error.key), known, n=1)
    return [f"did you mean {close[0]!r}?"] if close else [f"known here: {', '.join(known)}"]


def _mul(*factors: int) -> int:
    product = 1
    for factor in factors:
        product *= factor
    return product


def _floordiv(numerator: int, denominator: int) -> int:
    if denominator == 0 or numerator % denominator:
        raise ValueError(f"${{floordiv:{numerator},{denominator}}}: {numerator} is not a multiple of {denominator}")
    return numerator // denominator


def _share(number: int, share: float) -> int:
    """A share of so many, at least one of them."""
    return max(1, int(number * share))
