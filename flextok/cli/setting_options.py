"""Settings as options on a command line: each field of a dataclass, with underscores as dashes."""

import argparse
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def add_setting_options(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """An option for each field of `settings`, a dataclass of `flextok.training.setting_option` fields."""
    for option in fields(settings):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=type(option.default),
            default=option.default,
            choices=option.metadata["choices"],
            help=f"{option.metadata['help']} (%(default)s)",
        )


def read_settings(args: argparse.Namespace, settings: type[T]) -> T:
    """The settings that were given; errors are those of the dataclass."""
    return settings(**{option.name: getattr(args, option.name) for option in fields(settings)})  # type: ignore[arg-type]
