"""fraudctl, the operator's command line."""

import logging
import sys
from pathlib import Path
from traceback import extract_tb
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from fraudctl.call import CallError
from fraudctl.cli import CommandGroup, report
from fraudctl.commands import dead_letters, labels, models, operations, rehearsal, topics
from shared.errors import Outage, SettingsError
from shared.privacy import without_digits

_EXIT_CODES = (
    "Exit codes: 0 success; 1 something is unhealthy or failed a check; 2 the usage or a setting is wrong, or a system"
    " cannot be reached; 130 interrupted by Ctrl+C."
)


class _Root(CommandGroup):
    """Reports every error on stderr, without a traceback, and exits with the error's exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader closed the pipe; Typer then exits quietly
            raise
        except CallError as error:
            _end(str(error), error.exit_code)
        except (SettingsError, Outage) as error:
            _end(str(error), 2)
        except OSError as error:
            _end(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
            _end(_unforeseen(error), 1)
        return result


app = typer.Typer(
    cls=_Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXIT_CODES,
)
for _commands in (operations.commands, models.commands, labels.export_commands, rehearsal.commands):
    app.add_typer(_commands)
app.add_typer(topics.commands, name="topics")
app.add_typer(models.check_commands, name="models")
app.add_typer(dead_letters.commands, name="dead-letters")
app.add_typer(labels.commands, name="labels")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fraudctl {version('fraud-alarm')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Operate the fraud alarm: inspect it, fix it, train its models, and rehearse its failures."""


def _unforeseen(error: Exception) -> str:
    """Describe the error by its type, its place in the code, and its message.

    Digits are masked in the message, because a message may quote data.
    """
    place = extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return f"unexpected error, please report it: {type(error).__name__} in {where}: {without_digits(str(error))}"


def _end(reason: str, exit_code: int) -> NoReturn:
    report(reason)
    raise typer.Exit(exit_code)


def main() -> None:
    """Run the command line."""
    # librdkafka's errors need not be logged, because they are also raised as exceptions.
    logging.getLogger("librdkafka").addHandler(logging.NullHandler())
    get_command(app)(prog_name="fraudctl")


if __name__ == "__main__":
    main()
