"""Errors are types with a verdict: this record for ever, everything for now, or the operator's to mend."""


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
