"""The alerter: every fraud on topic_2 becomes an e-mail, at once."""

from collections.abc import Sequence
from datetime import UTC, datetime
from threading import Event
from typing import Annotated

import structlog
from confluent_kafka import Message
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from services.alerter.mail import Mailer, SmtpTls, compose
from services.alerter.mailed import Mailed
from shared import kafka, service
from shared.dead_letters import Limit, dead_letter
from shared.delivery import AtLeastOnce
from shared.errors import Poison
from shared.kafka import Record, headers
from shared.provenance import from_headers
from shared.records import decode_prediction, mask_card
from shared.settings import StreamSettings, kafka_properties
from shared.stream import Outcome, Stream

log = structlog.get_logger()

_REMEMBERED = 10_000  # frauds; every mail is followed by a commit, so that few can come again

Address = Annotated[str, Field(pattern=r"^[^\s@<>,]+@[^\s@<>,]+$")]


class AlerterSettings(StreamSettings):
    """What the alerter reads from its environment."""

    alerter_group: str = Field("alerter", min_length=1, description="Consumer group on topic_2")
    smtp_host: str = Field(min_length=1, description="Mail server")
    smtp_port: int = Field(587, ge=1, le=65535, description="Its port")
    smtp_tls: SmtpTls = Field("starttls", description="starttls, implicit or none")
    smtp_timeout_seconds: float = Field(20.0, gt=0, description="Longest wait for one of its answers")
    smtp_username: str | None = Field(None, pattern=r"^[ -~]+$", description="Login, if the server wants one")
    smtp_password: SecretStr | None = Field(None, description="Its password")
    alert_from: Address = Field(description="Sender of the alarms")
    alert_to: Annotated[tuple[Address, ...], NoDecode] = Field(
        min_length=1, description="Recipients, separated by commas"
    )

    @field_validator("alert_to", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("smtp_password")
    @classmethod
    def _ascii(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().isascii():
            raise ValueError("only ASCII can be sent to a mail server")
        return value


def serve(settings: AlerterSettings, shutdown: Event) -> None:
    """Mail until shutdown."""
    properties = kafka_properties(settings)
    stream = Stream(
        make_consumer=lambda: kafka.consumer(properties, group=settings.alerter_group, replica=settings.replica),
        topic=settings.topic_2,
        delivery=AtLeastOnce(properties=properties, shutdown=shutdown),
        settings=settings,
        shutdown=shutdown,
    )
    mailer = Mailer(
        host=settings.smtp_host,
        port=settings.smtp_port,
        tls=settings.smtp_tls,
        timeout_s=settings.smtp_timeout_seconds,
        username=settings.smtp_username,
        password=settings.smtp_password.get_secret_value() if settings.smtp_password else None,
    )
    mailed = Mailed(_REMEMBERED)
    limit = Limit(ratio=settings.dead_letter_limit_ratio, consecutive=settings.dead_letter_limit_consecutive)
    stream.run(lambda messages: alert(messages, mailer, mailed, limit, settings))
    mailer.close()


def alert(
    messages: Sequence[Message], mailer: Mailer, mailed: Mailed, limit: Limit, settings: AlerterSettings
) -> Outcome:
    """Mail the first fraud of the batch that is not `mailed` yet; what comes after it is left for the next round.

    So every accepted mail is followed by a commit at once, and a crash repeats one alarm at the most. Raises Outage.
    """
    dead: list[Record] = []
    for number, message in enumerate(messages, start=1):
        try:
            prediction = decode_prediction(message.value())
            if not prediction.prediction:
                continue
            if prediction.identity in mailed:
                log.info("alarm_repeat_skipped", id=prediction.trans_num)
                continue
            if dead:  # these go first: were they not accepted, the mail would be repeated with them
                return Outcome(number - 1, dead=dead)
        except Poison as poison:
            dead.append(dead_letter(message, str(poison), group=settings.alerter_group))
            continue
        mail = compose(
            prediction,
            from_headers(headers(message)),
            sender=settings.alert_from,
            recipients=settings.alert_to,
            now=datetime.now(UTC),
        )
        try:
            mailer.send(mail)
        except Poison as poison:
            limit.check([poison])
            dead.append(dead_letter(message, str(poison), group=settings.alerter_group))
            continue
        limit.check([mail])
        mailed.add(prediction.identity)
        log.info("alarm_mailed", card=mask_card(prediction.cc_num), amount=prediction.amt, id=prediction.trans_num)
        return Outcome(number)
    return Outcome(len(messages), dead=dead)


if __name__ == "__main__":
    service.run("alerter", AlerterSettings, serve)
