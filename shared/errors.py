"""Exceptions by what happens next.

Poison: dead-letter this record. Outage: wait and retry the batch. SettingsError: exit 2; the operator fixes it.
"""


class Poison(Exception):
    """This record can never be processed: it becomes a dead letter, and the records around it are processed."""


class Outage(Exception):
    """Something that the service needs is unavailable. Nothing is lost or dead-lettered; the work is retried later.

    `retry_after_s` is the wait that the payments API asked for; 0 if it did not.
    """

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class SettingsError(Exception):
    """A setting is missing or wrong. The program prints one line that names the setting, and exits with code 2."""
