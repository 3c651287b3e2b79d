"""Exceptions by what happens next.

Poison: dead-letter this record. Outage: wait and retry the batch. SettingsError: exit 2; the operator fixes it.
"""


class Poison(Exception):
    """This record can never be processed: it becomes a dead letter, and its neighbours go on."""


class Outage(Exception):
    """Something the service needs is away: nothing is lost or dead-lettered, and the work is retried later.

    `retry_after_s` is the wait that the payments API asked for; 0 if it did not.
    """

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class SettingsError(Exception):
    """A setting is missing or wrong: one line that names it, exit code 2."""
