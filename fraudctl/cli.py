"""What all commands share: how they are declared, where they print, and what they report on stderr.

A command file imports nothing heavy at its top: every `--help` imports all of them.
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
    """`--help` shows the names of values instead of Typer's types: `<bool>` for a flag, `<str>` for a name."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters with the help option."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if isinstance(parameter, TyperArgument):
                parameter.display_type_rich = lambda **_: None  # type: ignore[method-assign]  # it has a column of its own
            elif parameter.is_flag:
                parameter.metavar = ""  # it takes no value
        return parameters


class Command(_PlainTypes, TyperCommand):
    """A command."""


class CommandGroup(_PlainTypes, TyperGroup):
    """A group of commands."""


class Commands(typer.Typer):
    """A group of commands, each with an example in its `--help`."""

    def __init__(self, *, help: str | None = None) -> None:
        super().__init__(cls=CommandGroup, no_args_is_help=True, add_completion=False, help=help)

    def add(self, name: str, *examples: str) -> Callable[[F], F]:
        """Register the function as command `name`; its docstring and its parameters make the help."""
        epilog = "\n".join((f"Example{'s' * (len(examples) > 1)}:", *(f"  $ fraudctl {each}" for each in examples)))
        return self.command(name, cls=Command, epilog=epilog)


def say(text: str) -> None:
    """Print a line of results as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def report(text: str) -> None:
    """Print a line about a problem on stderr, without the credentials that a URL in it may hold."""
    sys.stderr.write(f"fraudctl: {without_credentials(text)}\n")
