"""Errors are types with a verdict: this record for ever, everything for now, or the operator's to mend."""

import re


class Poison(Exception):
    """This record can never be processed: it goes to the dead letters and its neighbours go on."""


class Outage(Exception):
    """Something the service needs is away: nothing is lost or dead-lettered, the work is tried again later.

    `retry_after_s` is what the payments API asked for, if it did.
    """

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class SettingsError(Exception):
    """A setting is missing or wrong: one line that names it, exit code 2."""


def without_digits(message: str, *, limit: int = 300) -> str:
    """An error's text, fit for logs and headers: libraries quote values, card numbers and birth dates among them."""
    return re.sub(r"\d", "#", " ".join(message.split()))[:limit]


def without_credentials(text: str) -> str:
    """The text with `user:password@` and the query of every URL left out: libraries quote addresses.

    All up to the last @ is left out: a password may have any character in it.
    """
    return re.sub(r"(://)(?:\S*@)?([^\s?]*)(?:\?\S*)?", r"\1\2", text)
