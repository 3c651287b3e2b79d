"""The channels that send alarms. Each channel has its own consumer group, so a slow channel delays no other channel."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.message import EmailMessage
from math import log2
from typing import Protocol

import structlog
from confluent_kafka import Message

from services.alerter.alarm import Alarm, Found, find, sample
from services.alerter.deferred import Deferred
from services.alerter.mail import Composer, Mailer, Refused
from services.alerter.pace import Pace
from services.alerter.remembered import Remembered
from services.alerter.settings import AlerterSettings
from services.alerter.webhook import Webhook
from shared import metrics
from shared.dead_letters import Limit, dead_letter, isolate
from shared.errors import Outage, Poison, SettingsError
from shared.flow import Flow
from shared.kafka.messages import Record
from shared.privacy import mask_card
from shared.stream.flight import Outcome

log = structlog.get_logger()

_REMEMBERED = 20_000  # alarms; far fewer are redelivered, because offsets are committed soon after sending
_LARGEST_POST = 500  # alarms per post
_CATCH_UP_S = 1.0


Sent = tuple[Message, Alarm]
"""An alarm, and the message that contains it."""


class Channel(Protocol):
    """Sends alarms to people or to other systems."""

    name: str
    group: str

    def handle(self, messages: Sequence[Message]) -> Outcome:
        """Send alarms from a batch. The first `Outcome.done` messages are finished, and later messages are redelivered.

        Raises Outage if the alarms cannot be sent now.
        """

    def test(self) -> None:
        """Send a sample alarm. Raises Poison if the alarm's content is refused, and Outage after any other failure."""

    def close(self) -> None:
        """Close the connection."""


class ByMail:
    """Sends one mail per alarm, immediately. If there are many alarms, sends digests instead.

    Once the server has accepted a mail, the offsets of the mail's alarms are committed before the next mail is sent.
    """

    name = "mail"

    def __init__(
        self,
        mailer: Mailer,
        composer: Composer,
        *,
        group: str,
        pace: Pace,
        largest_digest: int,
        backoff_initial_s: float,
        backoff_max_s: float,
    ) -> None:
        self.group = group
        self._mailer = mailer
        self._composer = composer
        self._pace = pace
        self._largest_digest = largest_digest
        self._deferred = Deferred(mailer.send, initial_s=backoff_initial_s, max_s=backoff_max_s)
        self._mailed = Remembered(_REMEMBERED)
        self._named_unsent = Remembered(_REMEMBERED)
        self._started_ms = time.time() * 1000
        self._catching_up = pace.burst < largest_digest  # see _caught_up
        self._refused_digests = 0

    def handle(self, messages: Sequence[Message]) -> Outcome:
        """Send at most one mail: either a mail about the first alarm, or a digest whose gathering time is over.

        Messages after the last mailed alarm are redelivered. Therefore, at most one mail is repeated after a crash. If
        a recipient is not accepted yet, the alarm's message is redelivered as well, but later messages go on.
        """
        return self._deferred.handle(messages, self._handle)

    def _handle(self, messages: Sequence[Message]) -> Outcome:
        single = not self._catching_up and self._pace.allows_single()
        found = find(messages, self._mailed, group=self.group, most=1 if single else self._largest_digest)
        metrics.ALARMS_WAITING.labels(self.name).set(len(found.alarms))
        if not found.alarms:
            return _finished(found)
        first, _ = found.alarms[0]
        if before := [letter for number, letter in found.dead if number < first]:
            return Outcome(first - 1, dead=before)  # written before mailing, so that a failed write repeats no mail
        if single:
            refused = _send(messages, found, self._single, by=self)
            self._pace.single_sent()
            return _finished(found, refused)
        if self._catching_up and messages[first - 1].timestamp()[1] >= self._started_ms:
            return self._caught_up(messages)
        if len(found.alarms) < self._largest_digest:
            seconds = self._pace.gather_s(at_most_s=_CATCH_UP_S) if self._catching_up else self._pace.gather_s()
            if seconds > 0:
                return Outcome(first - 1, keep=_to_keep(messages, found), again_in_s=seconds)
        if self._catching_up and len(found.alarms) <= self._pace.burst:
            return self._caught_up(messages)
        self._catching_up = False
        self._refused_digests = 0
        refused = _send(messages, found, self._digest, by=self)
        self._pace.digest_sent()
        return _finished(found, refused)

    def test(self) -> None:
        """Mail a sample alarm. Raises Poison if the mail's content is refused, and Outage after any other failure."""
        now = datetime.now(UTC)
        if later := self._mailer.send(self._composer.single(sample(now), now=now)):
            raise Outage(f"the mail server does not accept these recipients yet: {', '.join(later)}")

    def close(self) -> None:
        """Close the connection."""
        self._mailer.close()

    def _caught_up(self, messages: Sequence[Message]) -> Outcome:
        """Continue at the normal pace, because at most `burst` alarms were waiting when this process started.

        A larger backlog is mailed as a digest. The previous process may have mailed the same digest, and may have been
        killed before it committed the offsets. In that case, only one mail is repeated, rather than one mail per alarm.
        """
        self._catching_up = False
        self._pace.digest_sent()
        return self._handle(messages)

    def _single(self, alarms: Sequence[Sent]) -> Sequence[Poison | None]:
        for message, alarm in alarms:
            prediction = alarm.prediction
            try:
                self._mail(self._composer.single(alarm, now=datetime.now(UTC)), [message])
            except (Poison, Refused) as refusal:
                self._say_unsent([(message, alarm)], refusal)
                raise Poison(str(refusal)) from None
            self._mailed.add(alarm.identity)
            log.info("alarm_mailed", card=mask_card(prediction.cc_num), amount=prediction.amt, id=prediction.trans_num)
        return [None] * len(alarms)

    def _digest(self, alarms: Sequence[Sent]) -> Sequence[Poison | None]:
        if len(alarms) == 1:
            return self._single(alarms)
        messages, found = zip(*alarms, strict=True)
        try:
            self._mail(self._composer.digest(found, now=datetime.now(UTC)), messages)
        except (Poison, Refused) as refusal:
            self._refused_digests += 1
            # Isolating one bad alarm causes fewer refusals than this.
            if self._refused_digests > 2 * log2(self._largest_digest):
                self._say_unsent(alarms, refusal)
                return [Poison(str(refusal))] * len(alarms)
            raise Poison(str(refusal)) from None
        for alarm in found:
            self._mailed.add(alarm.identity)
        cards = {alarm.prediction.cc_num for alarm in found}
        log.info("digest_mailed", alarms=len(alarms), cards=len(cards))
        return [None] * len(alarms)

    def _mail(self, mail: EmailMessage, messages: Sequence[Message]) -> None:
        if later := self._mailer.send(mail):
            self._deferred.add(mail, later, messages)

    def _say_unsent(self, alarms: Sequence[Sent], refusal: Exception) -> None:
        """Send a plain mail that says which alarms could not be sent, unless it was sent already.

        If it is accepted, the alarms' mail was the cause of the refusal. Otherwise, raises Outage.
        """
        messages, found = zip(*alarms, strict=True)
        if all(alarm.identity in self._named_unsent for alarm in found):
            return
        try:
            self._mail(self._composer.unsent(found, now=datetime.now(UTC)), messages)
        except (Poison, Refused):
            raise Outage(f"{refusal} (a plain mail is refused as well)") from None
        for alarm in found:
            self._named_unsent.add(alarm.identity)


class ByWebhook:
    """Posts alarms immediately, at most 500 per post, to a system that does not need digests."""

    name = "webhook"

    def __init__(self, webhook: Webhook, *, group: str, limit: Limit) -> None:
        self.group = group
        self._webhook = webhook
        self._limit = limit
        self._posted = Remembered(_REMEMBERED)
        self._flow = Flow("alarms_posted")

    def handle(self, messages: Sequence[Message]) -> Outcome:
        """Post at most 500 alarms of the batch. Raises Outage if the alarms cannot be posted now.

        Messages after the last posted alarm are redelivered.
        """
        self._flow.report_if_due()
        found = find(messages, self._posted, group=self.group, most=_LARGEST_POST)
        metrics.ALARMS_WAITING.labels(self.name).set(len(found.alarms))
        if not found.alarms:
            return _finished(found)
        return _finished(found, _send(messages, found, self._post, by=self, judge=self._judge))

    def test(self) -> None:
        """Post a sample alarm. Raises Poison if the post's content is refused, and Outage after any other failure."""
        self._webhook.post([sample(datetime.now(UTC))], kind="fraud.test")

    def close(self) -> None:
        """Close the connection."""
        self._flow.report()
        self._webhook.close()

    def _judge(self, results: Sequence[object]) -> None:
        """Raise Outage if so many alarms are refused that a sample alarm is tried, and is refused as well."""

        def reference() -> None:
            try:
                self.test()
            except Poison as poison:
                raise Outage(str(poison)) from None

        self._limit.check(results, reference=reference)

    def _post(self, alarms: Sequence[Sent]) -> Sequence[None]:
        self._webhook.post([alarm for _, alarm in alarms])
        for _, alarm in alarms:
            self._posted.add(alarm.identity)
        self._flow.add(alarms=len(alarms))
        return [None] * len(alarms)


def configured(settings: AlerterSettings) -> list[Channel]:
    """Make the configured channels. Raises SettingsError if no channel is configured, or if a setting is wrong."""
    found = [_mail(settings)] if settings.smtp_host else []
    found += [_webhook(settings)] if settings.webhook_url else []
    if settings.smtp_host and settings.webhook_url and settings.alerter_group == settings.webhook_group:
        raise SettingsError("WEBHOOK_GROUP: must differ from ALERTER_GROUP, so that each channel receives every alarm")
    if not found:
        raise SettingsError(
            "SMTP_HOST: not set, and WEBHOOK_URL is not set either. Set at least one of them to send alarms"
        )
    return found


def mailer(settings: AlerterSettings) -> Mailer:
    """Make a client for the configured mail server."""
    return Mailer(
        host=settings.smtp_host or "",
        port=settings.smtp_port,
        tls=settings.smtp_tls,
        timeout_s=settings.smtp_timeout_seconds,
        username=settings.smtp_username,
        password=settings.smtp_password.get_secret_value() if settings.smtp_password else None,
    )


def _mail(settings: AlerterSettings) -> Channel:
    if not settings.alert_from:
        raise SettingsError("ALERT_FROM: required, because SMTP_HOST is set")
    if not settings.alert_to:
        raise SettingsError("ALERT_TO: required, because SMTP_HOST is set")
    return ByMail(
        mailer(settings),
        Composer(sender=settings.alert_from, recipients=settings.alert_to, templates=settings.alert_templates),
        group=settings.alerter_group,
        pace=Pace(burst=settings.alert_burst, window_s=settings.alert_digest_seconds),
        largest_digest=max(1, settings.max_batch_size // 2),
        backoff_initial_s=settings.backoff_initial_seconds,
        backoff_max_s=settings.backoff_max_seconds,
    )


def _webhook(settings: AlerterSettings) -> Channel:
    if not settings.webhook_secret:
        raise SettingsError("WEBHOOK_SECRET: required, because WEBHOOK_URL is set")
    try:
        webhook = Webhook(
            url=settings.webhook_url or "",
            secret=settings.webhook_secret.get_secret_value(),
            timeout_s=settings.webhook_timeout_seconds,
        )
    except ValueError as error:
        raise SettingsError(f"WEBHOOK_SECRET: {error}") from None
    return ByWebhook(webhook, group=settings.webhook_group, limit=Limit.from_settings(settings))


def _send(
    messages: Sequence[Message],
    found: Found,
    send: Callable[[Sequence[Sent]], Sequence[Poison | None]],
    *,
    by: Channel,
    judge: Callable[[Sequence[object]], None] = lambda _results: None,
) -> list[Record]:
    """Send the alarms. Returns a dead letter for each alarm that is permanently refused.

    Raises Outage if the alarms cannot be sent now, or if `judge` finds that the alarms are not the cause.
    """

    def counted(alarms: Sequence[Sent]) -> Sequence[Poison | None]:
        try:
            done = send(alarms)
        except Outage:
            metrics.ALARMS.labels(by.name, "failed").inc(len(alarms))
            raise
        except Poison:
            metrics.ALARMS.labels(by.name, "failed").inc(len(alarms) == 1)  # a larger group is split and sent again
            raise
        sent = done.count(None)
        metrics.ALARMS.labels(by.name, "sent").inc(sent)
        metrics.ALARMS.labels(by.name, "failed").inc(len(done) - sent)
        return done

    results = isolate([(messages[number - 1], alarm) for number, alarm in found.alarms], counted)
    judge(results)
    return [
        dead_letter(messages[number - 1], str(result), group=by.group)
        for (number, _), result in zip(found.alarms, results, strict=True)
        if isinstance(result, Poison)
    ]


def _to_keep(messages: Sequence[Message], found: Found) -> list[Message]:
    """Return the messages to redeliver while a digest is gathered.

    Only messages from the first alarm on are returned: the alarms and the unreadable messages in `found`, and the last
    message of each partition, which `Outcome.keep` requires.
    """
    wanted = {number for number, _ in (*found.alarms, *found.dead)}
    wanted |= set({message.partition(): number for number, message in enumerate(messages, start=1)}.values())
    return [messages[number - 1] for number in sorted(wanted) if number >= found.alarms[0][0]]


def _finished(found: Found, refused: Sequence[Record] = ()) -> Outcome:
    if found.repeats:
        metrics.SKIPPED.inc(found.repeats)
        log.info("alarm_repeats_skipped", alarms=found.repeats)
    return Outcome(found.read, dead=[*(letter for _, letter in found.dead), *refused])
