"""Exceptions for three kinds of problem, which differ in what happens next.

After Poison, the record becomes a dead letter. After Outage, the service waits and retries the batch. After
SettingsError, the program exits with code 2, and the operator must fix a setting.
"""


class Poison(Exception):
    """A record can never be processed. It becomes a dead letter, and the other records of its batch are processed."""


class Outage(Exception):
    """Something that the service needs is unavailable. Nothing is lost or dead-lettered. The work is retried later.

    `retry_after_s` is the number of seconds that the payments API asked the producer to wait, or 0 if the API did not
    ask.
    """

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class SettingsError(Exception):
    """A setting is missing or wrong. The program prints one line that names the setting, and exits with code 2."""
