"""The alerter's settings."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from shared.settings import StreamSettings

SmtpTls = Literal["none", "starttls", "implicit"]
Address = Annotated[str, Field(pattern=r"^[^\s@<>,]+@[^\s@<>,]+$")]


class AlerterSettings(StreamSettings):
    """What the alerter reads from its environment."""

    max_batch_size: int = Field(
        2000, ge=1, le=20_000, description="Most records in a batch, and half as many alarms in a digest"
    )
    alerter_group: str = Field("alerter", min_length=1, description="Consumer group on topic_2 of the mails")
    smtp_host: str | None = Field(None, min_length=1, description="Mail server; without one, no mails")
    smtp_port: int = Field(587, ge=1, le=65535, description="Its port")
    smtp_tls: SmtpTls = Field("starttls", description="How the connection is encrypted")
    smtp_timeout_seconds: float = Field(20.0, gt=0, description="Longest wait for one of its answers")
    smtp_username: str | None = Field(None, pattern=r"^[ -~]+$", description="Login, if the server wants one")
    smtp_password: SecretStr | None = Field(None, description="Its password")
    alert_from: Address | None = Field(None, description="Sender of the alarms")
    alert_to: Annotated[tuple[Address, ...], NoDecode] = Field((), description="Recipients, separated by commas")
    alert_burst: int = Field(10, ge=0, description="Mails that go out at once before alarms are gathered in digests")
    alert_digest_seconds: float = Field(
        60.0, gt=0, description="How long a digest gathers; for each such time, one of the burst comes back"
    )
    alert_templates: Path | None = Field(None, description="Folder whose templates replace the mails' own")
    webhook_url: str | None = Field(
        None, repr=False, pattern=r"^https?://\S+$", description="Where alarms are posted as JSON"
    )
    webhook_secret: SecretStr | None = Field(None, min_length=16, description="What the posts are signed with")
    webhook_timeout_seconds: float = Field(10.0, gt=0, description="Longest wait for an answer")
    webhook_group: str = Field("alerter-webhook", min_length=1, description="Consumer group on topic_2 of the posts")

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
