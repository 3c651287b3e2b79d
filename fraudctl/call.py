"""Parses times and ages on the command line, and defines the error of a command that cannot do what was asked."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

_AGE = re.compile(r"(\d{1,9})([mhd])", re.ASCII).fullmatch
_UNIT_MS = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}


class CallError(Exception):
    """A command cannot do what was asked. The message is one line, or a heading with a line for each problem."""

    exit_code = 2


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Convert these exceptions of other packages to CallError, with the same message."""
    try:
        yield
    except errors as error:
        raise CallError(str(error)) from None


def parse_since(text: str, *, now_ms: int, option: str = "--since") -> int:
    """Parse an ISO date or time, or an age such as 90m, and return the time in epoch milliseconds.

    An age is counted back from `now_ms`. A time without an offset is in UTC.

    Raises CallError for any other text.
    """
    if age := _AGE(text):
        return now_ms - int(age[1]) * _UNIT_MS[age[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CallError(f"{option}: {text!r} is neither a time (2026-01-31T21:30) nor an age (90m, 2h, 3d)") from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
