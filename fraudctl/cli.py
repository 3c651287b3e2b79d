"""Shared code of all commands: declares commands, prints results, and reports problems on stderr.

Command modules import heavy packages inside functions only, because even `--help` imports all command modules.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperArgument, TyperCommand, TyperGroup

from shared.privacy import without_credentials

F = TypeVar("F", bound=Callable[..., object])

console = Console()


class _PlainTypes:
    """Makes `--help` show the names of values, such as FILE, instead of Typer's types, such as `<str>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's parameters, including `--help`."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if isinstance(parameter, TyperArgument):
                # The name of the value has a column of its own.
                parameter.display_type_rich = lambda **_: None  # type: ignore[method-assign]
            elif parameter.is_flag:
                parameter.metavar = ""  # a flag takes no value
        return parameters


class Command(_PlainTypes, TyperCommand):
    """A command."""


class CommandGroup(_PlainTypes, TyperGroup):
    """A group of commands."""


class Commands(typer.Typer):
    """A group of commands whose `--help` texts end with examples."""

    def __init__(self, *, help: str | None = None) -> None:
        super().__init__(cls=CommandGroup, no_args_is_help=True, add_completion=False, help=help)

    def add(self, name: str, *examples: str) -> Callable[[F], F]:
        """Return a decorator that registers a function as command `name`.

        The function's docstring and parameters become the command's help text.
        """
        epilog = "\n".join((f"Example{'s' * (len(examples) > 1)}:", *(f"  $ fraudctl {each}" for each in examples)))
        return self.command(name, cls=Command, epilog=epilog)


def say(text: str) -> None:
    """Print a line of results as it is, without interpreting markup or breaking the line."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def report(text: str) -> None:
    """Report a problem in one line on stderr. Credentials are removed from the URLs in `text`."""
    sys.stderr.write(f"fraudctl: {without_credentials(text)}\n")
