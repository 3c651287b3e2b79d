"""Composes e-mails about alarms and sends them through a mail server."""

import binascii
import csv
import errno
import hashlib
import io
import re
import smtplib
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import policy
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path
from typing import IO

import jinja2
import structlog

from services.alerter.alarm import Alarm, Shown, batch_id, dollars, fields, sample, show
from services.alerter.settings import SmtpTls
from shared.errors import Outage, Poison, SettingsError
from shared.network import Watch, why_unreachable
from shared.privacy import without_digits
from shared.text import one_line

log = structlog.get_logger()


# Long headers are not folded, because some mail readers show an extra space at a fold. RFC 5322 allows lines of
# 998 characters. Bodies have 7-bit characters only, because not every server accepts others (8BITMIME, RFC 6152).
_WIDE = policy.SMTP.clone(max_line_length=990, cte_type="7bit")
_MOST_REPLY_BYTES = 64 * 1024
_TOO_MANY = 452  # recipients
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEMPLATES = ("alert.txt", "alert.html", "digest.txt", "digest.html")
_CARDS_THREADED = 10_000
# Matches the start of a formula: certain characters at the start of a text or after a cell separator. In countries with
# a decimal comma, spreadsheets separate cells with semicolons instead of commas, and drop quotes that follow one.
_FORMULA = re.compile('(^|[;\t|])((?:[^\\S\t]|")*[=+@\uff1d\uff0b\uff0d\uff20-])')


@dataclass(frozen=True)
class Card:
    """A card in a digest, with its total amount and its alarms, oldest first."""

    card: str
    amount: str
    alarms: list[Shown]


class Composer:
    """Composes mails from templates. A file in `templates` replaces the built-in template with the same name."""

    def __init__(self, *, sender: str, recipients: Sequence[str], templates: Path | None = None) -> None:
        """Raises SettingsError if the folder or one of its templates cannot be used."""
        self._sender = sender
        self._recipients = ", ".join(recipients)
        built_in = jinja2.PackageLoader("services.alerter")
        self._built_in = _environment(built_in)
        self._environment = self._built_in
        self._threads: dict[int, str] = {}  # the Message-ID of each card's first mail, by card number, oldest first
        if templates:
            if not templates.is_dir():
                raise SettingsError(f"ALERT_TEMPLATES: {templates} is not a folder")
            self._environment = _environment(jinja2.ChoiceLoader([jinja2.FileSystemLoader(templates), built_in]))
            for name in _TEMPLATES:
                try:
                    self._environment.get_template(name).render(_context([sample(datetime.now(UTC))]))
                except Exception as error:  # a template runs code, so it may raise any exception
                    reason = f"{type(error).__name__}: {error}"
                    raise SettingsError(
                        f"ALERT_TEMPLATES: {templates / name} cannot render a sample alarm: {reason}"
                    ) from None

    def single(self, alarm: Alarm, *, now: datetime) -> EmailMessage:
        """Compose the mail about one alarm. Mails about the same card form a thread."""
        shown = show(alarm)
        subject = f"Fraud alert: {shown.amount} at {shown.merchant} (card ending {shown.card[-4:]})"
        identity = message_id(alarm.identity, sender=self._sender)
        message = self._message(subject, identity, now)
        first = self._threads.setdefault(alarm.prediction.cc_num, identity)
        if len(self._threads) > _CARDS_THREADED:
            del self._threads[next(iter(self._threads))]
        if first != identity:
            message["In-Reply-To"] = message["References"] = first
        self._fill(message, "alert", [alarm])
        return message

    def unsent(self, alarms: Sequence[Alarm], *, now: datetime) -> EmailMessage:
        """Compose the mail that says that alarms could not be sent. Nothing in it comes from a payment's texts."""
        message = self._message(
            f"Fraud alert: {len(alarms)} alarm{'s' * (len(alarms) > 1)} could not be sent",
            f"<unsent.{batch_id(alarms)}@{self._domain}>",
            now,
        )
        lines = [
            "The mail server refused the mail about the alarms below. They are kept as dead letters: see",
            "`fraudctl dead-letters list`.",
            "",
            *(_plain_line(alarm) for alarm in alarms),
        ]
        message.set_content("\n".join(lines) + "\n")
        return message

    def digest(self, alarms: Sequence[Alarm], *, now: datetime) -> EmailMessage:
        """Compose the mail about several alarms. The mail has a table of alarms by card, and a CSV file."""
        cards = len({alarm.prediction.cc_num for alarm in alarms})
        amount = dollars(sum(alarm.prediction.amt for alarm in alarms))
        subject = f"Fraud digest: {len(alarms):,} alarms on {cards:,} card{'s' * (cards > 1)}, {amount}"
        message = self._message(subject, f"<digest.{batch_id(alarms)}@{self._domain}>", now)
        self._fill(message, "digest", alarms)
        name = f"frauds-{now.astimezone(UTC):%Y%m%dT%H%M%SZ}.csv"
        message.add_attachment(table(alarms), subtype="csv", filename=name)
        return message

    @property
    def _domain(self) -> str:
        return self._sender.rpartition("@")[2]

    def _message(self, subject: str, identity: str, now: datetime) -> EmailMessage:
        message = EmailMessage(policy=_WIDE)
        # Python decodes encoded words (RFC 2047) in the text of a header, and what they contain may be further headers.
        message["Subject"] = subject.replace("=?", "= ?")
        message["From"] = self._sender
        message["To"] = self._recipients
        message["Date"] = format_datetime(now.astimezone(UTC))
        message["Message-ID"] = identity
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834: prevents automatic replies, such as vacation notices
        return message

    def _fill(self, message: EmailMessage, name: str, alarms: Sequence[Alarm]) -> None:
        context = _context(alarms)
        message.set_content(self._rendered(f"{name}.txt", context))
        message.add_alternative(self._rendered(f"{name}.html", context), subtype="html")

    def _rendered(self, name: str, context: Mapping[str, object]) -> str:
        try:
            return self._environment.get_template(name).render(context)
        except Exception as error:  # an alarm must not wait until somebody fixes the template
            if self._environment is self._built_in:
                raise
            log.warning("template_failed", template=name, reason=f"{type(error).__name__}: {error}")
            return self._built_in.get_template(name).render(context)


def _environment(loader: jinja2.BaseLoader) -> jinja2.Environment:
    return jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
    )


def _context(alarms: Sequence[Alarm]) -> dict[str, object]:
    """Return the template variables.

    The variables are `alarm` (the first alarm), `cards`, `count` (the number of alarms) and `amount` (the alarms'
    total, as text).
    """
    return {
        "alarm": show(alarms[0]),
        "cards": by_card(alarms),
        "count": len(alarms),
        "amount": dollars(sum(alarm.prediction.amt for alarm in alarms)),
    }


def by_card(alarms: Sequence[Alarm]) -> list[Card]:
    """Group the alarms by card. The card with the largest total amount is first."""
    groups: dict[int, list[Alarm]] = {}
    for alarm in sorted(alarms, key=lambda alarm: alarm.identity[::-1]):
        groups.setdefault(alarm.prediction.cc_num, []).append(alarm)
    amounts = {card: sum(each.prediction.amt for each in group) for card, group in groups.items()}
    shown = {card: list(map(show, group)) for card, group in groups.items()}
    largest_first = sorted(groups, key=lambda card: -amounts[card])
    return [Card(shown[card][0].card, dollars(amounts[card]), shown[card]) for card in largest_first]


def table(alarms: Sequence[Alarm]) -> str:
    """Format the alarms as CSV with a header line. Text that a spreadsheet would run as a formula is made harmless."""
    out = io.StringIO()
    writer = csv.writer(out)
    rows = [fields(alarm) for alarm in alarms]
    writer.writerow(rows[0])
    writer.writerows(
        [_inert(one_line(value)) if isinstance(value, str) else value for value in row.values()] for row in rows
    )
    return out.getvalue()


def _inert(text: str) -> str:
    """Put an apostrophe before each formula in the text, so that a spreadsheet shows the formula as text.

    https://owasp.org/www-community/attacks/CSV_Injection
    """
    return _FORMULA.sub(r"\1'\2", text)


def _plain_line(alarm: Alarm) -> str:
    trans_num, unix_time = alarm.identity
    named = trans_num if _PLAIN_ID.fullmatch(trans_num) else "(unusual transaction number)"
    shown = show(alarm)
    return f"{named} (unix_time {unix_time}), {shown.amount}, card ending {shown.card[-4:]}"


def message_id(identity: tuple[str, int], *, sender: str) -> str:
    """Return the Message-ID (RFC 5322, 3.6.4) for a transaction.

    A transaction always has the same Message-ID, so mail readers can recognise a repeated mail.
    """
    trans_num, unix_time = identity
    left = trans_num if _PLAIN_ID.fullmatch(trans_num) else hashlib.sha256(trans_num.encode()).hexdigest()
    return f"<{left}.{unix_time}@{sender.rpartition('@')[2]}>"


class Refused(Outage):
    """The server refuses this mail for ever, but it is unknown whether it would refuse any other mail as well."""


@dataclass(kw_only=True)
class Mailer:
    """A client for a mail server. The client connects when it sends its first message, and then stays connected."""

    host: str
    port: int
    tls: SmtpTls
    timeout_s: float  # timeout for each response of the server
    username: str | None = None
    password: str | None = None
    _connection: smtplib.SMTP | None = None

    def send(self, message: EmailMessage, recipients: Sequence[str] | None = None) -> list[str]:
        """Send the message to these recipients (default: those in its header), and return once it is accepted.

        Returns the recipients that the server does not accept now, but may accept later. A recipient that the server
        will never accept is logged.

        Raises Poison if the server permanently refuses this message's content, Refused if the server refuses it for
        another reason, and Outage after any other failure.
        """
        reused = self._connection is not None
        try:
            return self._send(message, recipients)
        except smtplib.SMTPServerDisconnected as error:
            self.close()
            if not reused or isinstance(error.__cause__ or error.__context__, TimeoutError):
                raise self._unreachable(error) from None
            return self.send(message, recipients)  # with a new connection, because servers disconnect idle clients
        except (smtplib.SMTPDataError, smtplib.SMTPSenderRefused) as error:
            # The server may already refuse a large message after MAIL FROM, because that command states its size.
            self.close()
            reason = self._answer(error.smtp_code, error.smtp_error)
            raise _verdict(error)(reason) from None
        except smtplib.SMTPRecipientsRefused as error:
            self.close()
            code, text = next(iter(error.recipients.values()))
            raise Outage(f"{self._answer(code, text)} (every recipient was refused; check ALERT_TO)") from None
        except smtplib.SMTPAuthenticationError as error:
            self.close()
            reason = self._answer(error.smtp_code, error.smtp_error)
            raise Outage(f"{reason} (check SMTP_USERNAME and SMTP_PASSWORD)") from None
        except smtplib.SMTPResponseException as error:
            self.close()
            raise Outage(self._answer(error.smtp_code, error.smtp_error)) from None
        except (smtplib.SMTPException, UnicodeError) as error:
            self.close()
            raise Outage(f"mail server {self.host}:{self.port}: {one_line(str(error)).rstrip('.')}") from None
        except OSError as error:
            self.close()
            raise self._unreachable(error) from None

    def _unreachable(self, error: OSError) -> Outage:
        reason = why_unreachable(error, default="connection closed by the server")
        remedy = "Check that it runs, and check SMTP_HOST, SMTP_PORT and SMTP_TLS"
        return Outage(f"cannot reach the mail server {self.host}:{self.port}: {reason}. {remedy}")

    def _answer(self, code: int, text: bytes | str) -> str:
        return f"mail server {self.host}:{self.port} answered {code} {_text(text)}"

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    def _send(self, message: EmailMessage, recipients: Sequence[str] | None) -> list[str]:
        if self._connection is None:
            self._connection = self.connect()
        try:
            refused = self._connection.send_message(message, to_addrs=recipients)
        except smtplib.SMTPRecipientsRefused as error:
            if recipients is None or len(error.recipients) < len(recipients):  # perhaps it is not about recipients
                raise
            return _deferred(error.recipients)
        others = [recipient for recipient, (code, _) in refused.items() if code == _TOO_MANY]
        later = _deferred({recipient: refused[recipient] for recipient in refused if recipient not in others})
        if others:  # they get a mail of their own (RFC 5321, 4.5.3.1.10)
            try:
                later += self._send(message, others)
            except (smtplib.SMTPException, OSError):  # the first recipients must not get the mail again
                self.close()
                later += others
        return later

    def connect(self) -> smtplib.SMTP:
        """Open a connection, and log in if there is a user name.

        Raises OSError if the connection fails, SMTPException if the server refuses encryption or the login, and
        UnicodeError if the host name is malformed.
        """
        context = ssl.create_default_context()
        if self.tls == "implicit":
            connection: smtplib.SMTP = _TlsConnection(self.host, self.port, timeout=self.timeout_s, context=context)
        else:
            connection = _Bounded(self.host, self.port, timeout=self.timeout_s)
        try:
            if self.tls == "starttls":
                connection.starttls(context=context)
            if self.username:
                connection.login(self.username, self.password or "")
        except binascii.Error:
            connection.close()
            raise smtplib.SMTPException("the server's prompt for the login is not base64") from None
        except BaseException:
            connection.close()
            raise
        return connection


class _Bounded(smtplib.SMTP):
    """Ends the connection if a response is too large, or takes longer than the timeout as a whole."""

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        self._watch = Watch()
        connection: socket.socket = super()._get_socket(host, port, timeout)  # type: ignore[misc]
        self._watch.opened(connection)
        return connection

    def getreply(self) -> tuple[int, bytes]:
        """Read a response."""
        if self.file is None and self.sock:
            self.file = _Replies(self.sock.makefile("rb"))
        if self.file:
            self.file.left = _MOST_REPLY_BYTES
        with self._watch.limit(self.timeout):
            try:
                reply = super().getreply()
            except smtplib.SMTPServerDisconnected:
                if not self._watch.late:
                    raise
        if self._watch.late:  # what has arrived may be only the beginning of a response
            self.close()
            raise smtplib.SMTPServerDisconnected("timed out") from TimeoutError()
        return reply

    def close(self) -> None:
        """Close the connection."""
        super().close()
        self._watch.close()


class _TlsConnection(smtplib.SMTP_SSL, _Bounded):  # in this order, because only a socket without TLS can be watched
    """A connection with TLS from the start."""


class _Replies:
    """The responses of a mail server, of which only as many bytes are read as are `left`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = 0

    def readline(self, most: int) -> bytes:
        """Read a line. Raises OSError if the response is too large."""
        line = self._file.readline(most)
        self.left -= len(line)
        if self.left < 0:
            raise OSError(errno.EMSGSIZE, "response too large")
        return line

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _verdict(error: smtplib.SMTPDataError | smtplib.SMTPSenderRefused) -> type[Poison] | type[Outage]:
    """Return what a refusal is about: the content of this message, perhaps only this message, or the server.

    If the response has an enhanced status code (RFC 3463), that code decides. Codes 5.6.x are about the content. Codes
    5.2.3 and 5.3.4 are about the size. All other enhanced codes are about the account, the sender or a policy, such as
    a filter that takes the message for spam.

    If the response has no enhanced code, code 552 is about the size (RFC 1870). For any other code, the stage decides:
    a refusal after the server has received the message's data is about the message, an earlier one is not.
    """
    if error.smtp_code < 500:
        return Outage
    enhanced = re.match(rb"5\.\d+\.\d+", error.smtp_error if isinstance(error.smtp_error, bytes) else b"")
    if enhanced:
        return Poison if enhanced[0] in (b"5.2.3", b"5.3.4") or enhanced[0].startswith(b"5.6.") else Refused
    return Poison if error.smtp_code == 552 or isinstance(error, smtplib.SMTPDataError) else Refused


def _deferred(refused: Mapping[str, tuple[int, bytes]]) -> list[str]:
    """Log the recipients that the server refused. Returns those that it may accept later."""
    for recipient, (code, text) in refused.items():
        event = "recipient_deferred" if code < 500 else "recipient_refused"
        log.warning(event, recipient=recipient, reason=f"{code} {_text(text)}")
    return [recipient for recipient, (code, _) in refused.items() if code < 500]


def _text(reply: bytes | str) -> str:
    return without_digits(reply.decode(errors="replace") if isinstance(reply, bytes) else reply)
