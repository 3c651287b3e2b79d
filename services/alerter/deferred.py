"""Recipients that the mail server does not accept yet, for example because of greylisting (RFC 6647).

They are tried again alone, while other alarms go on. Until they are accepted, the offsets of their alarms are not
committed, so that a process that is killed meanwhile sends these alarms, and those after them, again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from functools import partial

import structlog
from confluent_kafka import Message

from shared.errors import Outage, Poison
from shared.kafka.messages import coordinates
from shared.retry import delay_s
from shared.stream.flight import Outcome

log = structlog.get_logger()

_GIVE_UP_S = 3600.0
_NEW_MESSAGES_S = 0.5  # new messages are handed over together with those that are kept, so look this often

Place = tuple[str, int, int]
"""Topic, partition and offset."""


@dataclass
class _Mail:
    message: EmailMessage
    recipients: list[str]
    places: set[Place]  # the first record with one of the mail's alarms in each partition
    since: float  # monotonic time, like `due`
    due: float = 0.0
    attempts: int = 0


class Deferred:
    """The mails that some recipients have not got yet."""

    def __init__(
        self, send: Callable[[EmailMessage, Sequence[str]], list[str]], *, initial_s: float, max_s: float
    ) -> None:
        """`send` returns the recipients that are not accepted yet."""
        self._send = send
        self._initial_s = initial_s
        self._max_s = max_s
        self._mails: list[_Mail] = []
        self._handled: set[Place] = set()  # records that are only kept for their offsets

    def add(self, message: EmailMessage, recipients: list[str], records: Sequence[Message]) -> None:
        """Try these recipients again later. `records` contain the mail's alarms."""
        firsts = {place[:2]: place for place in map(coordinates, reversed(records))}
        mail = _Mail(message, recipients, set(firsts.values()), time.monotonic())
        self._postpone(mail)
        self._mails.append(mail)

    def handle(self, messages: Sequence[Message], handle: Callable[[Sequence[Message]], Outcome]) -> Outcome:
        """Send a mail that is due. Then let `handle` process the messages that were not processed yet.

        At most one mail is sent, because each may take as long as the server's timeout.
        """
        mail = min(self._mails, key=lambda mail: mail.due, default=None)
        if mail and time.monotonic() >= mail.due:
            self._try(mail)
        new = [message for message in messages if coordinates(message) not in self._handled]
        outcome = handle(new) if new else Outcome(0)
        return self._hold(messages, new, outcome) if self._handled or self._mails else outcome

    def _try(self, mail: _Mail) -> None:
        reason = "the mail server still does not accept them"
        try:
            mail.recipients = self._send(mail.message, mail.recipients)
        except (Outage, Poison) as failure:
            reason = str(failure)
        if mail.recipients and time.monotonic() - mail.since > _GIVE_UP_S:
            log.error("recipients_given_up", recipients=mail.recipients, reason=reason)
            mail.recipients = []
        if mail.recipients:
            self._postpone(mail)
        else:
            self._mails.remove(mail)

    def _postpone(self, mail: _Mail) -> None:
        mail.due = time.monotonic() + delay_s(mail.attempts, initial_s=self._initial_s, max_s=self._max_s)
        mail.attempts += 1

    def _hold(self, messages: Sequence[Message], new: Sequence[Message], outcome: Outcome) -> Outcome:
        """Return the outcome for all messages: those before the first deferred record are finished, others are kept."""
        left = set(map(coordinates, new[outcome.done :] if outcome.keep is None else outcome.keep))
        unfinished = left.union(*(mail.places for mail in self._mails))
        places = list(map(coordinates, messages))
        done = next((number for number, place in enumerate(places) if place in unfinished), len(places))
        last = set({place[:2]: place for place in places}.values())
        kept = set(places[done:]) & (unfinished | last)
        waits_s = [mail.due - time.monotonic() for mail in self._mails]
        if left:
            waits_s.append(outcome.again_in_s)
        return outcome._replace(
            done=done,
            keep=[message for message, place in zip(messages, places, strict=True) if place in kept],
            again_in_s=min(_NEW_MESSAGES_S, max(0.0, min(waits_s, default=0.0))),
            # Not before the dead letters are written: after a failed write, every message must be handled again.
            delivered=partial(self._set_handled, kept - left),
        )

    def _set_handled(self, places: set[Place]) -> None:
        self._handled = places
