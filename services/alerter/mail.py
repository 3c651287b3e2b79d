"""A fraud as an e-mail: what it says, and how it reaches the mail server."""

import hashlib
import re
import smtplib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import policy
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Literal

import jinja2
import structlog

from shared.errors import Outage, Poison, without_digits
from shared.provenance import Provenance
from shared.records import Prediction, mask_card

log = structlog.get_logger()

SmtpTls = Literal["none", "starttls", "implicit"]

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("services.alerter"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)
# Long headers stay on one line, as RFC 5322 allows up to 998 characters: folded ones gain a space in some readers.
_WIDE = policy.SMTP.clone(max_line_length=990)
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Alert:
    """What a person reads of a fraud, every field ready to be shown: no full card number, no birth date."""

    amount: str
    merchant: str
    category: str
    place: str
    time: str
    card: str
    probability: str
    model: str
    trans_num: str


def describe(prediction: Prediction, provenance: Provenance) -> Alert:
    """A prediction in people's words."""
    known = provenance.probability is not None
    return Alert(
        amount=f"${prediction.amt:,.2f}",
        merchant=_line(prediction.merchant.removeprefix("fraud_")),  # every merchant of the source bears this prefix
        category=_line(prediction.category.replace("_", " ")),
        place=_line(f"{prediction.city}, {prediction.state}"),
        time=f"{_line(prediction.trans_date_trans_time)} UTC",
        card=mask_card(prediction.cc_num),
        probability=f"{provenance.probability:.1%}" if known else "not given by this model",
        model=_line(f"{provenance.model_name} version {provenance.model_version}"),
        trans_num=_line(prediction.trans_num),
    )


def compose(
    prediction: Prediction, provenance: Provenance, *, sender: str, recipients: Sequence[str], now: datetime
) -> EmailMessage:
    """The e-mail about one fraud, in plain text and HTML."""
    alert = describe(prediction, provenance)
    rows = [
        ("Category", alert.category),
        ("Place", alert.place),
        ("Time", alert.time),
        ("Card", alert.card),
        ("Probability", alert.probability),
        ("Model", alert.model),
        ("Transaction", alert.trans_num),
    ]
    message = EmailMessage(policy=_WIDE)
    message["Subject"] = f"Fraud alert: {alert.amount} at {alert.merchant} (card ending {alert.card[-4:]})"
    message["From"] = sender
    message["To"] = ", ".join(recipients)
    message["Date"] = format_datetime(now.astimezone(UTC))
    message["Message-ID"] = message_id(prediction.identity, sender=sender)
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no vacation replies, please
    message.set_content(_TEMPLATES.get_template("alert.txt").render(alert=alert))
    message.add_alternative(_TEMPLATES.get_template("alert.html").render(alert=alert, rows=rows), subtype="html")
    return message


def message_id(identity: tuple[str, int], *, sender: str) -> str:
    """The same for the same transaction for ever, so that a repeated alarm is recognisable (RFC 5322, 3.6.4)."""
    trans_num, unix_time = identity
    left = trans_num if _PLAIN_ID.fullmatch(trans_num) else hashlib.sha256(trans_num.encode()).hexdigest()
    return f"<{left}.{unix_time}@{sender.rpartition('@')[2]}>"


@dataclass(kw_only=True)
class Mailer:
    """One connection to the mail server, opened when needed and kept."""

    host: str
    port: int
    tls: SmtpTls
    timeout_s: float  # for each answer
    username: str | None = None
    password: str | None = None
    _connection: smtplib.SMTP | None = None

    def send(self, message: EmailMessage) -> None:
        """Have the server accept the message.

        Raises Poison if it refuses this message's content for good, Outage for anything else that went wrong.
        """
        reused = self._connection is not None
        try:
            self._send(message)
        except smtplib.SMTPServerDisconnected as error:
            self.close()
            if not reused or isinstance(error.__context__, TimeoutError):
                raise Outage(f"mail server: {error}") from None
            self.send(message)  # servers hang up on idle clients
        except smtplib.SMTPDataError as error:
            self.close()
            reason = f"mail server: {error.smtp_code} {_text(error.smtp_error)}"
            raise (Poison(reason) if _about_this_message(error) else Outage(reason)) from None
        except smtplib.SMTPRecipientsRefused as error:
            self.close()
            code, text = next(iter(error.recipients.values()))
            raise Outage(f"mail server refuses every recipient: {code} {_text(text)}") from None
        except smtplib.SMTPResponseException as error:
            self.close()
            raise Outage(f"mail server: {error.smtp_code} {_text(error.smtp_error)}") from None
        except (smtplib.SMTPException, OSError, UnicodeError) as error:
            self.close()
            raise Outage(f"mail server: {type(error).__name__}: {error}") from None

    def close(self) -> None:
        """Hang up."""
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    def _send(self, message: EmailMessage) -> None:
        if self._connection is None:
            self._connection = self._connect()
        for recipient, (code, text) in self._connection.send_message(message).items():
            log.warning("recipient_refused", recipient=recipient, reason=f"{code} {_text(text)}")

    def _connect(self) -> smtplib.SMTP:
        context = ssl.create_default_context()
        if self.tls == "implicit":
            connection: smtplib.SMTP = smtplib.SMTP_SSL(self.host, self.port, timeout=self.timeout_s, context=context)
        else:
            connection = smtplib.SMTP(self.host, self.port, timeout=self.timeout_s)
        try:
            if self.tls == "starttls":
                connection.starttls(context=context)
            if self.username:
                connection.login(self.username, self.password or "")
        except BaseException:
            connection.close()
            raise
        return connection


def _about_this_message(error: smtplib.SMTPDataError) -> bool:
    """True for a permanent refusal that the next message need not meet.

    By the enhanced status code, where there is one (RFC 3463): 5.6.x is the content, 5.2.3 and 5.3.4 are the size. The
    others are about the account, the sender or a policy.
    """
    enhanced = re.match(rb"5\.\d+\.\d+", error.smtp_error if isinstance(error.smtp_error, bytes) else b"")
    return error.smtp_code >= 500 and (
        enhanced is None or enhanced[0] in (b"5.2.3", b"5.3.4") or enhanced[0].startswith(b"5.6.")
    )


def _line(text: str) -> str:
    """On one line, so that no header and no row of the text can be forged."""
    return " ".join(text.split())[:200]


def _text(reply: bytes | str) -> str:
    return without_digits(reply.decode(errors="replace") if isinstance(reply, bytes) else reply)
