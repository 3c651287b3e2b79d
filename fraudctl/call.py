"""Times and ages on the command line, and the error for a request that cannot be carried out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

_AGE = re.compile(r"(\d{1,9})([mhd])", re.ASCII).fullmatch
_UNIT_MS = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}


class CallError(Exception):
    """A command cannot do what was asked. The message has a line, or a heading and a line for each problem."""

    exit_code = 2


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Convert these errors of another package, which a wrong call causes, to CallError with the same message."""
    try:
        yield
    except errors as error:
        raise CallError(str(error)) from None


def parse_since(text: str, *, now_ms: int, option: str = "--since") -> int:
    """The epoch ms of an ISO date or time (UTC unless it has an offset), or of an age such as 90m.

    Raises CallError for any other text.
    """
    if age := _AGE(text):
        return now_ms - int(age[1]) * _UNIT_MS[age[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CallError(f"{option}: {text!r} is neither a time (2026-01-31T21:30) nor an age (90m, 2h, 3d)") from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
