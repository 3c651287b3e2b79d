"""Settings of the alerter."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from shared.settings import StreamSettings, matching
from shared.text import one_line

SmtpTls = Literal["none", "starttls", "implicit"]
PrintableAscii = Annotated[str, matching(r"[ -~]+", "must be printable ASCII")]
HttpUrl = Annotated[str, matching(r"https?://\S+", "must be a URL that begins with http:// or https://")]


def _ascii_address(text: str) -> str:
    """Return the address in ASCII. Raises ValueError if the text is not an address that every mail server accepts."""
    import email_validator  # not above, because the list of services reads these settings, and is to load fast

    email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()  # a server of one's own may well deliver to localhost or .local
    try:
        if "=?" in text:  # Python decodes encoded words (RFC 2047) in headers with addresses as well
            raise email_validator.EmailNotValidError
        address = email_validator.validate_email(
            text,
            allow_smtputf8=False,
            allow_domain_literal=True,
            check_deliverability=False,
            globally_deliverable=False,
        )
    except email_validator.EmailNotValidError:
        raise ValueError(f'"{one_line(text)}" is not an e-mail address') from None
    return address.ascii_email or address.normalized


Address = Annotated[str, AfterValidator(_ascii_address)]


class AlerterSettings(StreamSettings):
    """The settings of the alerter."""

    max_batch_size: int = Field(
        2000,
        ge=1,
        le=20_000,
        description="Maximum number of records in a batch; a digest contains at most half this number of alarms",
    )
    alerter_group: str = Field(
        "alerter", min_length=1, description="Name of the consumer group that reads topic_2 and sends mails"
    )
    smtp_host: str | None = Field(
        None, min_length=1, description="Host of the mail server; if SMTP_HOST is not set, no mails are sent"
    )
    smtp_port: int = Field(587, ge=1, le=65535, description="Port of the mail server")
    smtp_tls: SmtpTls = Field("starttls", description="Encryption of the connection to the mail server")
    smtp_timeout_seconds: float = Field(20.0, gt=0, description="Seconds to wait for each response of the mail server")
    smtp_username: PrintableAscii | None = Field(
        None, description="User name for the mail server, if it requires a login"
    )
    smtp_password: SecretStr | None = Field(None, description="Password for SMTP_USERNAME")
    alert_from: Address | None = Field(None, description="Sender address of the mails")
    alert_to: Annotated[tuple[Address, ...], NoDecode] = Field(
        (), description="Recipients of the mails, separated by commas"
    )
    alert_burst: int = Field(
        10,
        ge=0,
        description="Number of alarms to mail immediately, one per mail, before more alarms are gathered into a digest",
    )
    alert_digest_seconds: float = Field(
        60.0,
        gt=0,
        description=(
            "Seconds for which alarms are gathered into a digest; in this time, "
            "the allowance of ALERT_BURST refills by one"
        ),
    )
    alert_templates: Path | None = Field(
        None, description="Folder with mail templates; each template replaces the built-in template of the same name"
    )
    webhook_url: HttpUrl | None = Field(None, repr=False, description="URL to which alarms are posted as JSON")
    webhook_secret: SecretStr | None = Field(
        None, min_length=16, description="Secret key for signing the posts to the webhook"
    )
    webhook_timeout_seconds: float = Field(
        10.0, gt=0, description="Seconds to wait for the webhook's response to a post"
    )
    webhook_group: str = Field(
        "alerter-webhook",
        min_length=1,
        description="Name of the consumer group that reads topic_2 and posts to the webhook",
    )

    @field_validator("alert_to", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("smtp_password")
    @classmethod
    def _ascii(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().isascii():
            raise ValueError("must be ASCII")
        return value
