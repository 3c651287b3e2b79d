"""Recipients that the mail server does not accept yet, for example because of greylisting (RFC 6647).

They are tried again alone, while other alarms go on. Until they are accepted, the offsets of their alarms are not
committed, so that a process that is killed meanwhile sends these alarms again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import EmailMessage

import structlog
from confluent_kafka import Message

from shared.errors import Outage, Poison
from shared.kafka.messages import coordinates
from shared.retry import delay_s
from shared.stream.flight import Outcome

log = structlog.get_logger()

_GIVE_UP_S = 3600.0

Place = tuple[str, int, int]
"""Topic, partition and offset."""


@dataclass
class _Mail:
    message: EmailMessage
    recipients: list[str]
    places: set[Place]  # of the records with the mail's alarms
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
        self._passed: set[Place] = set()  # records that are finished, and are only kept for their offsets

    def add(self, message: EmailMessage, recipients: list[str], records: Sequence[Message]) -> None:
        """Try these recipients again later. `records` contain the mail's alarms."""
        mail = _Mail(message, recipients, set(map(coordinates, records)), time.monotonic())
        self._postpone(mail)
        self._mails.append(mail)

    def handle(self, messages: Sequence[Message], handle: Callable[[Sequence[Message]], Outcome]) -> Outcome:
        """Send what is due. Then let `handle` process the messages that were not processed yet."""
        for mail in [mail for mail in self._mails if time.monotonic() >= mail.due]:
            self._try(mail)
        known = self._passed.union(*(mail.places for mail in self._mails))
        new = [message for message in messages if coordinates(message) not in known] if known else messages
        outcome = handle(new) if new else Outcome(0)
        return self._hold(messages, new, outcome) if known or self._mails else outcome

    def _try(self, mail: _Mail) -> None:
        try:
            mail.recipients = self._send(mail.message, mail.recipients)
        except (Outage, Poison) as refusal:
            if time.monotonic() - mail.since > _GIVE_UP_S:
                log.error("recipients_given_up", recipients=mail.recipients, reason=str(refusal))
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
        left = new[outcome.done :] if outcome.keep is None else outcome.keep
        unfinished = set(map(coordinates, left)).union(*(mail.places for mail in self._mails))
        places = list(map(coordinates, messages))
        done = next((number for number, place in enumerate(places) if place in unfinished), len(places))
        last = set({place[:2]: place for place in places}.values())
        self._passed = (last & set(places[done:])) - unfinished
        keep = [message for message, place in zip(messages, places, strict=True) if place in unfinished | self._passed]
        waits_s = [mail.due - time.monotonic() for mail in self._mails]
        if left:
            waits_s.append(outcome.again_in_s)
        return outcome._replace(done=done, keep=keep, again_in_s=max(0.0, min(waits_s, default=0.0)))
