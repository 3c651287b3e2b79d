"""A mail server that keeps what it is sent: one .eml file a message, its name beginning with the time of receipt."""

import argparse
import asyncio
import signal
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from itertools import count
from pathlib import Path

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from sandbox.processes import Process, free_port, port_open, python


@dataclass(frozen=True)
class ReceivedMail:
    """A message as it was received."""

    received_ms: int  # epoch
    message: EmailMessage
    path: Path


class Mailbox(Process):
    """The mail server on 127.0.0.1; its port and its messages stay over stop, kill and start.

    With a login it accepts mail only after AUTH; with a certificate (PEM, key included) it offers STARTTLS.
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


def messages(directory: Path) -> Iterator[ReceivedMail]:
    """What was received, oldest first."""
    yield from map(read_mail, sorted(directory.glob("*.eml")))


def read_mail(path: Path) -> ReceivedMail:
    """One message and when it was received, which its file's name tells."""
    parser = BytesParser(_class=EmailMessage, policy=policy.default)
    return ReceivedMail(int(path.name.partition("-")[0]), parser.parsebytes(path.read_bytes()), path)


class _Keeper:
    """Writes each message under a temporary name first, so that whoever lists the folder sees whole ones only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = count(len(list(directory.glob("*.eml"))) + 1)

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        name = f"{time.time_ns() // 1_000_000}-{next(self._numbers):07d}"
        partial = self._directory / f"{name}.partial"
        content = envelope.content or b""
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.rename(partial.with_suffix(".eml"))
        return "250 OK"


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
        return AuthResult(success=login == expected, handled=False)  # the server answers

    def session() -> SMTP:
        return SMTP(
            keeper,
            hostname="mailbox.localhost",
            tls_context=tls,
            require_starttls=tls is not None,
            authenticator=authenticate if arguments.username else None,
            auth_required=bool(arguments.username),
            auth_require_tls=tls is not None,
        )

    server = await loop.create_server(session, "127.0.0.1", arguments.port)
    async with server:
        await stop.wait()


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
    asyncio.run(_serve(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
