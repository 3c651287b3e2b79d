"""A mail server that stores the messages it receives, and simulates faults on request.

Each message is stored as an .eml file. The name of the file begins with the time of receipt. The first line of the
file, `X-Envelope-To`, lists the recipients.
"""

import argparse
import asyncio
import csv
import io
import signal
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from functools import lru_cache
from itertools import count, cycle
from pathlib import Path
from typing import Any, AnyStr

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from sandbox.processes import Process, free_port, port_open, python

FAULTS = (
    "4xx",
    "5xx-one-recipient",
    "7bit",
    "endless",
    "greylisting",
    "hang",
    "prompt-not-base64",
    "spam",
    "too-many-recipients",
)
SPAM = "casino"  # with the fault `spam`, a mail that contains this word is refused
_ORDER = "misbehave"  # the file in the mailbox's directory that names the current fault
_HANG_POLL_S = 0.05
_STAGES = ("MAIL", "RCPT", "DATA")
_ENDLESS_LINES = b"\r\n".join([b"250-more follows"] * 1000)
_MOST_RECIPIENTS = 2
_SPAM_REFUSALS = ("550 5.7.1 Rejected as spam", "552 5.7.0 Policy violation", "554 5.2.0 Delivery refused")
_TEMPORARY = (
    "421 4.3.2 Service is shutting down",
    "450 4.2.1 Mailbox is busy",
    "451 4.3.0 Try again later",
    "452 4.3.1 Insufficient system storage",
)


@dataclass(frozen=True)
class ReceivedMail:
    """A received message."""

    received_ms: int  # epoch
    message: EmailMessage
    path: Path

    @property
    def alarms(self) -> list[tuple[str, int]]:
        """Return the trans_num and unix_time of each alarm in the mail.

        The values come from the attached table or, without a table, from the Message-ID. A mail that says that alarms
        could not be sent has none.
        """
        attached = next(self.message.iter_attachments(), None)
        if attached is not None:
            rows = csv.DictReader(io.StringIO(str(attached.get_content())))
            return [(row["trans_num"], int(row["unix_time"])) for row in rows]
        left = str(self.message["Message-ID"])[1:].partition("@")[0]
        trans_num, _, unix_time = left.rpartition(".")
        if trans_num == "unsent":
            return []
        return [(trans_num, int(unix_time))]


class Mailbox(Process):
    """The mail server on 127.0.0.1. Its port and messages survive stop, kill and restart.

    With `login`, the server accepts mail only after AUTH. With `certificate`, the server requires STARTTLS. The
    certificate's PEM file must include the private key.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        login: tuple[str, str] | None = None,
        certificate: Path | None = None,
    ) -> None:
        self.directory = directory
        self.port = port or free_port()
        options = ["--directory", str(directory), "--port", str(self.port)]
        if login:
            options += ["--username", login[0], "--password", login[1]]
        if certificate:
            options += ["--certificate", str(certificate)]
        super().__init__(
            "mailbox",
            python("sandbox.mailbox", *options),
            log=directory.parent / "mailbox.log",
            ready=lambda: port_open(self.port),
        )

    def misbehave(self, kind: str | None) -> None:
        """Simulate this fault until the next call or restart. None means that the server works normally.

        - `4xx`: the server refuses every mail temporarily, at varying stages and with varying codes. Code 421 closes
          the connection.
        - `5xx-one-recipient`: the server permanently refuses only the recipients whose local part begins with "gone".
        - `7bit`: the server does not offer 8BITMIME, and permanently refuses a mail with other than 7-bit characters.
        - `endless`: each response is the beginning of a response that never ends.
        - `greylisting`: the server temporarily refuses only the recipients whose local part begins with "grey".
        - `hang`: the server accepts connections and commands but never responds. When the fault changes, hanging
          sessions are closed. The mails of these sessions are not stored, because the clients may have given up.
        - `prompt-not-base64`: the server prompts for the login in plain text.
        - `spam`: the server permanently refuses each mail whose subject or text contains `SPAM`, with varying codes.
        - `too-many-recipients`: the server accepts only the first two recipients of a mail.

        Raises ValueError for any other fault.
        """
        if kind is not None and kind not in FAULTS:
            raise ValueError(f"unknown fault: {kind}")
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f"{_ORDER}.partial"
        partial.write_text(kind or "")
        partial.replace(self.directory / _ORDER)


def messages(directory: Path) -> Iterator[ReceivedMail]:
    """Yield the received messages, oldest first."""
    yield from map(read_mail, sorted(directory.glob("*.eml")))


def repeated_mails(mails: Sequence[ReceivedMail]) -> set[int]:
    """Return the indices of the mails with an alarm that a later mail repeats. `mails` must be sorted, oldest first."""
    first: dict[tuple[str, int], int] = {}
    found = set()
    for place, mail in enumerate(mails):
        for identity in mail.alarms:
            if first.setdefault(identity, place) != place:
                found.add(first[identity])
    return found


@lru_cache(10_000)  # those who wait for mails read all of them again and again
def read_mail(path: Path) -> ReceivedMail:
    """Read one message. The time of receipt comes from the name of the file."""
    return ReceivedMail(int(path.name.partition("-")[0]), _parsed(path.read_bytes()), path)


def _parsed(content: bytes) -> EmailMessage:
    return BytesParser(_class=EmailMessage, policy=policy.default).parsebytes(content)


def _mentions(content: bytes, word: str) -> bool:
    """Return whether the mail's subject or a text in the mail, an attached text included, contains the word."""
    message = _parsed(content)
    texts = (str(part.get_content()) for part in message.walk() if part.get_content_maintype() == "text")
    return any(word in text for text in (str(message["Subject"]), *texts))


class _Session(SMTP):
    """A client's session. Reads the current fault whenever data arrives, and applies it to the response."""

    def __init__(self, keeper: "_Keeper", **options: Any) -> None:
        super().__init__(keeper, **options)
        self._order = keeper.directory / _ORDER
        self.fault: str | None = None
        self.refusal = ("DATA", "451 4.3.0 Try again later")  # for a mail that was in progress when the fault began

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._look()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._look()
        super().data_received(data)

    async def push(self, status: AnyStr) -> None:
        """Send a response. All responses of a session go through this method."""
        if self.fault == "hang":
            while _fault(self._order) == "hang":
                await asyncio.sleep(_HANG_POLL_S)
            if self.transport:
                self.transport.close()
            raise asyncio.CancelledError  # as aiosmtpd does to end a session whose client has disconnected
        while self.fault == "endless" and self.transport and _fault(self._order) == "endless":
            await super().push(_ENDLESS_LINES)
        await super().push(status)
        if self.transport and isinstance(status, str) and status.startswith("421"):
            self.transport.close()

    async def smtp_AUTH(self, arg: str) -> None:
        """Prompt for the login, or check the login that the client sends."""
        if self.fault == "prompt-not-base64":
            await self.push("334 Who are you?")
        else:
            await super().smtp_AUTH(arg)

    def _look(self) -> None:
        if self.fault != "hang":
            self.fault = _fault(self._order)


class _Keeper:
    """Stores each message, or responds as the current fault requires."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._numbers = count(len(list(directory.glob("*.eml"))) + 1)
        # There are 3 stages and 4 codes, so all combinations occur.
        self._refusals = zip(cycle(_STAGES), cycle(_TEMPORARY), strict=False)
        self._spam_refusals = cycle(_SPAM_REFUSALS)

    async def handle_EHLO(
        self, server: _Session, session: Session, _envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        return [line for line in responses if not (server.fault == "7bit" and line == "250-8BITMIME")]

    async def handle_MAIL(
        self, server: _Session, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if server.fault == "4xx":
            server.refusal = next(self._refusals)
        if refusal := _refusal(server, "MAIL"):
            return refusal
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(
        self, server: _Session, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if refusal := _refusal(server, "RCPT"):
            return refusal
        if server.fault == "5xx-one-recipient" and address.startswith("gone"):
            return "550 5.1.1 No such user"
        if server.fault == "greylisting" and address.startswith("grey"):
            return "451 4.7.1 Greylisted, try again later"
        if server.fault == "too-many-recipients" and len(envelope.rcpt_tos) == _MOST_RECIPIENTS:
            return "452 4.5.3 Too many recipients"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 OK"

    async def handle_DATA(self, server: _Session, _session: Session, envelope: Envelope) -> str:
        if server.fault == "hang":
            return "451 Not stored"  # `push` never sends this response
        if refusal := _refusal(server, "DATA"):
            return refusal
        content = envelope.original_content or b""
        if server.fault == "7bit" and not content.isascii():
            return "554 5.6.1 8-bit characters are not supported"
        if server.fault == "spam" and _mentions(content, SPAM):
            return next(self._spam_refusals)
        name = f"{time.time_ns() // 1_000_000}-{next(self._numbers):07d}"
        partial = self.directory / f"{name}.partial"  # so that only complete messages are listed
        recipients = f"X-Envelope-To: {', '.join(envelope.rcpt_tos)}\r\n"
        partial.write_bytes(recipients.encode() + content)
        partial.rename(partial.with_suffix(".eml"))
        # Nothing is awaited from here to the response. SIGTERM ends sessions only between two steps of the event loop,
        # so a mail is either both stored and acknowledged, or neither.
        return "250 OK"


def _refusal(server: _Session, stage: str) -> str | None:
    """Return the response that temporarily refuses the mail at this stage, or None.

    With the fault `4xx`, a mail that was not refused earlier is refused at DATA.
    """
    due, reply = server.refusal
    return reply if server.fault == "4xx" and stage in (due, "DATA") else None


def _fault(order: Path) -> str | None:
    try:
        return order.read_text() or None
    except FileNotFoundError:
        return None


async def _serve(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tls = None
    if arguments.certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(arguments.certificate)
    keeper = _Keeper(arguments.directory)

    def authenticate(*details: object) -> AuthResult:
        login = details[-1]
        expected = LoginPassword(arguments.username.encode(), arguments.password.encode())
        return AuthResult(success=login == expected, handled=False)  # let aiosmtpd send the response

    def session() -> SMTP:
        return _Session(
            keeper,
            hostname="mailbox.localhost",
            tls_context=tls,
            require_starttls=tls is not None,
            authenticator=authenticate if arguments.username else None,
            auth_required=bool(arguments.username),
            auth_require_tls=tls is not None,
        )

    server = await loop.create_server(session, "127.0.0.1", arguments.port)
    await stop.wait()
    server.close()  # wait_closed() would wait for clients that keep their connections open


def main() -> int:
    """Receive mail until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--username", default="")
    parser.add_argument("--password", default="")
    parser.add_argument("--certificate", type=Path)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    (arguments.directory / _ORDER).unlink(missing_ok=True)  # an earlier run may have left this file
    asyncio.run(_serve(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
