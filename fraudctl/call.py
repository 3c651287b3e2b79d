"""What an operator asks for, in words: times and ages, and why something cannot be done."""

import re
from datetime import UTC, datetime

_AGE = re.compile(r"(\d{1,9})([mhd])", re.ASCII).fullmatch
_UNIT_MS = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}


class CallError(Exception):
    """What was asked for cannot be done: one line that says why, and perhaps one for each part of it."""


def parse_since(text: str, *, now_ms: int, option: str = "--since") -> int:
    """Epoch ms of an ISO date or time, UTC unless it says otherwise, or of an age such as 90m. Raises CallError."""
    if age := _AGE(text):
        return now_ms - int(age[1]) * _UNIT_MS[age[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CallError(f"{option}: {text!r} is neither a time (2026-01-31T21:30) nor an age (90m, 2h, 3d)") from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
