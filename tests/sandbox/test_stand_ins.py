"""The parts of the local stack: errors at their start, what survives a restart, and that they end with their parent."""

import os
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from email import policy
from email.message import EmailMessage
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import until

from sandbox.mailbox import FAULTS, SPAM, Mailbox, messages
from sandbox.postgres import Postgres
from sandbox.processes import Process, StandInError, free_port, port_open, python

pytestmark = pytest.mark.server

PARENT = """
import sys, time
from pathlib import Path
from sandbox.processes import Process
child = Process("child", [sys.executable, "-c", "import time; time.sleep(60)"], log=Path(sys.argv[1]))
print(child.start().pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child that its parent died")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent_however_that_ends(tmp_path: Path, end: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)

    parent.send_signal(end)
    parent.communicate()

    until(lambda: not alive(child), timeout_s=5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a port for who asks by its number")
def test_a_reserved_port_goes_only_to_a_server_that_asks_for_it() -> None:
    port = free_port()

    with closing(socket.socket()) as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))

    with socket.create_server(("127.0.0.1", port)):
        assert port_open(port)


@pytest.mark.parametrize(
    ("ready", "reason"), [(lambda: False, "part ended during its start: no such port"), (lambda: True, None)]
)
def test_a_child_that_ends_during_its_start_is_reported_with_its_last_line(
    tmp_path: Path, ready: Callable[[], bool], reason: str | None
) -> None:
    part = Process("part", [sys.executable, "-c", "exit('no such port')"], log=tmp_path / "log", ready=ready)
    if reason is None:
        assert part.start().wait(10) == 1
        return
    with pytest.raises(StandInError, match=reason):
        part.start()


def test_a_child_that_never_gets_ready_is_killed(tmp_path: Path) -> None:
    part = Process(
        "part",
        [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(60)"],
        log=tmp_path / "log",
        ready=lambda: False,
        ready_timeout_s=1,
    )
    with pytest.raises(StandInError, match="part was not ready after 1 s"):
        part.start()
    assert not part.running


def test_a_missing_module_is_reported(tmp_path: Path) -> None:
    part = Process("part", python("sandbox.nowhere"), log=tmp_path / "log", ready=lambda: False)
    with pytest.raises(StandInError, match=r"No module named sandbox\.nowhere"):
        part.start()


def test_postgresql_keeps_its_rows_across_stop_and_kill(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with Postgres(tmp_path / "database") as database:

        def run(statement: str) -> list[tuple[object, ...]]:
            engine = sa.create_engine(database.url, poolclass=sa.NullPool)
            with engine.begin() as connection:
                found = connection.execute(sa.text(statement))
                return [tuple(row) for row in found] if found.returns_rows else []

        run("CREATE TABLE kept (number int)")
        run("INSERT INTO kept VALUES (1)")
        database.stop()
        database.start()
        run("INSERT INTO kept VALUES (2)")
        database.kill()
        database.start()

        assert run("SELECT number FROM kept ORDER BY number") == [(1,), (2,)]
        assert str(run("SHOW server_version")[0][0]).startswith("18")
    assert database.pid is not None
    assert not alive(database.pid)
    assert os.getpid() != database.pid


def client(mailbox: Mailbox, *, timeout_s: float = 10.0) -> smtplib.SMTP:
    return smtplib.SMTP("127.0.0.1", mailbox.port, timeout=timeout_s)


def deliver(session: smtplib.SMTP, subject: str, *recipients: str) -> dict[str, tuple[int, bytes]]:
    """Send a mail that is accepted. Returns the refused recipients."""
    return session.sendmail("a@bank.example", recipients or ("b@bank.example",), f"Subject: {subject}\r\n\r\ntext\r\n")


def kept(mailbox: Mailbox) -> list[str]:
    return [str(mail.message["Subject"]) for mail in messages(mailbox.directory)]


def test_a_mail_is_stored_byte_for_byte_with_its_recipients(mailbox: Mailbox) -> None:
    with client(mailbox) as session:
        deliver(session, "one", "b@bank.example", "c@bank.example")

    (mail,) = messages(mailbox.directory)
    assert mail.message["X-Envelope-To"] == "b@bank.example, c@bank.example"
    assert mail.path.read_bytes().partition(b"\r\n")[2] == b"Subject: one\r\n\r\ntext\r\n"


def test_temporary_refusals_come_at_every_stage_with_every_code_and_nothing_is_stored(mailbox: Mailbox) -> None:
    mailbox.misbehave("4xx")
    refusals = set()
    for number in range(12):
        with client(mailbox) as session:
            try:
                deliver(session, str(number), "b@bank.example", "c@bank.example")
            except smtplib.SMTPRecipientsRefused as refused:
                refusals |= {("RCPT", code) for code, _ in refused.recipients.values()}
            except smtplib.SMTPSenderRefused as refused:
                refusals.add(("MAIL", refused.smtp_code))
            except smtplib.SMTPDataError as refused:
                refusals.add(("DATA", refused.smtp_code))

    assert refusals == {(stage, code) for stage in ("MAIL", "RCPT", "DATA") for code in (421, 450, 451, 452)}
    mailbox.misbehave(None)
    with client(mailbox) as session:
        deliver(session, "at last")
    assert kept(mailbox) == ["at last"]


@pytest.mark.parametrize("refused_before", [False, True])
def test_a_mail_in_progress_is_refused_temporarily_too(mailbox: Mailbox, refused_before: bool) -> None:
    with client(mailbox) as session:
        session.ehlo()
        if refused_before:
            mailbox.misbehave("4xx")
            with pytest.raises(smtplib.SMTPSenderRefused), client(mailbox) as other:
                deliver(other, "at MAIL")
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                deliver(session, "at RCPT")
            mailbox.misbehave(None)
        session.mail("a@bank.example")
        session.rcpt("b@bank.example")
        mailbox.misbehave("4xx")

        assert session.data("Subject: caught\r\n\r\n")[0] // 10 == 45
    assert kept(mailbox) == []


def test_421_closes_the_connection(mailbox: Mailbox) -> None:
    mailbox.misbehave("4xx")
    with client(mailbox) as session:
        session.ehlo()
        assert session.mail("a@bank.example")[0] == 421

        with pytest.raises(smtplib.SMTPServerDisconnected):
            session.noop()


def test_an_unknown_recipient_is_refused_and_the_others_get_the_mail(mailbox: Mailbox) -> None:
    mailbox.misbehave("5xx-one-recipient")
    with client(mailbox) as session:
        refused = deliver(session, "one", "gone.analyst@bank.example", "b@bank.example")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            deliver(session, "two", "gone@bank.example")

    assert refused == {"gone.analyst@bank.example": (550, b"5.1.1 No such user")}
    (mail,) = messages(mailbox.directory)
    assert (mail.message["Subject"], mail.message["X-Envelope-To"]) == ("one", "b@bank.example")


def test_a_hanging_server_accepts_connections_and_does_not_answer(mailbox: Mailbox) -> None:
    with client(mailbox) as before:
        before.ehlo()
        mailbox.misbehave("hang")

        before.sock.settimeout(0.3)
        with pytest.raises(smtplib.SMTPServerDisconnected, match="timed out"):
            before.noop()
        with pytest.raises(smtplib.SMTPServerDisconnected, match="timed out"):
            client(mailbox, timeout_s=0.3)

    mailbox.misbehave(None)
    with client(mailbox) as session:
        deliver(session, "one")
    assert kept(mailbox) == ["one"]


@pytest.mark.parametrize("then", [None, "4xx"])
@pytest.mark.parametrize("patient", [True, False])
def test_a_mail_in_progress_when_the_server_hangs_is_never_stored(
    mailbox: Mailbox, patient: bool, then: str | None
) -> None:
    session = client(mailbox)
    session.ehlo()
    session.mail("a@bank.example")
    session.rcpt("b@bank.example")
    assert session.docmd("DATA")[0] == 354
    session.send(b"Subject: caught\r\n")
    mailbox.misbehave("hang")
    session.send(b"\r\ntext\r\n.\r\n")
    session.sock.settimeout(1.0)
    with pytest.raises(TimeoutError):
        session.sock.recv(1)
    if not patient:
        session.close()

    mailbox.misbehave(then)

    if patient:
        session.sock.settimeout(10)
        assert session.sock.recv(1) == b""
        session.close()
    mailbox.misbehave(None)
    with client(mailbox) as later:
        deliver(later, "next")
    mailbox.stop()
    assert kept(mailbox) == ["next"]


def test_a_mail_that_began_to_arrive_while_the_server_hung_is_never_stored(mailbox: Mailbox) -> None:
    with client(mailbox) as session:
        session.ehlo()
        session.mail("a@bank.example")
        session.rcpt("b@bank.example")
        session.docmd("DATA")
        mailbox.misbehave("hang")
        session.send(b"Subject: caught\r\n")
        session.sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            session.sock.recv(1)
        mailbox.misbehave(None)

        session.send(b"\r\ntext\r\n.\r\n")

        session.sock.settimeout(10)
        assert session.sock.recv(1) == b""
        session.close()
    assert kept(mailbox) == []


def test_spam_is_refused_for_good_wherever_the_word_is(mailbox: Mailbox) -> None:
    mailbox.misbehave("spam")
    encoded = EmailMessage(policy=policy.SMTP)
    encoded["Subject"] = "caf\u00e9 " + SPAM
    encoded.set_content("text")
    attached = EmailMessage(policy=policy.SMTP)
    attached.set_content("caf\u00e9 " + SPAM, cte="base64")
    refusals = []
    with client(mailbox) as session:
        for message in (encoded, attached, attached):
            with pytest.raises(smtplib.SMTPDataError) as refused:
                session.send_message(message, "a@bank.example", "b@bank.example")
            refusals.append((refused.value.smtp_code, refused.value.smtp_error.partition(b" ")[0]))
        deliver(session, "harmless")

    assert refusals == [(550, b"5.7.1"), (552, b"5.7.0"), (554, b"5.2.0")]
    assert kept(mailbox) == ["harmless"]


def test_a_greylisted_recipient_is_accepted_later_and_the_others_get_the_mail(mailbox: Mailbox) -> None:
    mailbox.misbehave("greylisting")
    with client(mailbox) as session:
        refused = deliver(session, "one", "grey@bank.example", "b@bank.example")
        mailbox.misbehave(None)
        deliver(session, "one", "grey@bank.example")

    assert refused == {"grey@bank.example": (451, b"4.7.1 Greylisted, try again later")}
    assert [mail.message["X-Envelope-To"] for mail in messages(mailbox.directory)] == [
        "b@bank.example",
        "grey@bank.example",
    ]


def test_a_third_recipient_is_too_many(mailbox: Mailbox) -> None:
    mailbox.misbehave("too-many-recipients")
    with client(mailbox) as session:
        refused = deliver(session, "one", *(f"{name}@bank.example" for name in "abc"))

    assert refused == {"c@bank.example": (452, b"4.5.3 Too many recipients")}
    (mail,) = messages(mailbox.directory)
    assert mail.message["X-Envelope-To"] == "a@bank.example, b@bank.example"


def test_a_server_of_old_accepts_seven_bits_only(mailbox: Mailbox) -> None:
    mailbox.misbehave("7bit")
    with client(mailbox) as session:
        session.ehlo()
        assert not session.has_extn("8bitmime")
        assert not session.has_extn("smtputf8")
        with pytest.raises(smtplib.SMTPDataError, match=r"5\.6\.1"):
            session.sendmail("a@bank.example", "b@bank.example", "caf\u00e9\r\n".encode())
        deliver(session, "one")

    assert kept(mailbox) == ["one"]


def test_an_endless_response_ends_with_the_fault(mailbox: Mailbox) -> None:
    with closing(client(mailbox)) as session:
        session.ehlo()
        mailbox.misbehave("endless")
        session.putcmd("NOOP")
        lines = session.sock.makefile("rb")
        assert {next(lines) for _ in range(10_000)} == {b"250-more follows\r\n"}

        mailbox.misbehave(None)

        assert any(line.startswith(b"250 ") for line in lines)


def test_a_prompt_for_the_login_may_be_plain_text(tmp_path: Path) -> None:
    with Mailbox(tmp_path / "mail", login=("alarm", "secret")) as server, client(server) as session:
        server.misbehave("prompt-not-base64")
        session.ehlo()
        assert session.docmd("AUTH", "LOGIN") == (334, b"Who are you?")


def test_a_fault_ends_with_the_process(mailbox: Mailbox) -> None:
    mailbox.misbehave("hang")
    with pytest.raises(smtplib.SMTPServerDisconnected):
        client(mailbox, timeout_s=0.1)

    assert mailbox.stop() == 0
    mailbox.start()

    with client(mailbox) as session:
        deliver(session, "one")
    assert kept(mailbox) == ["one"]


def test_an_unknown_fault_is_refused(mailbox: Mailbox) -> None:
    assert "fire" not in FAULTS
    with pytest.raises(ValueError, match="unknown fault: fire"):
        mailbox.misbehave("fire")


def test_a_mail_server_that_is_stopped_keeps_what_it_accepted_and_nothing_else(mailbox: Mailbox) -> None:
    accepted: list[str] = []
    numbers = count()

    def deliver_until_it_ends(_: int) -> None:
        with pytest.raises((smtplib.SMTPException, OSError)), client(mailbox) as session:
            while True:
                subject = str(next(numbers))
                deliver(session, subject)
                accepted.append(subject)

    for _ in range(5):
        before = len(accepted)
        with ThreadPoolExecutor(8) as pool:
            clients = pool.map(deliver_until_it_ends, range(8))
            until(lambda before=before: len(accepted) > before + 50)
            assert mailbox.stop() == 0
            list(clients)
        mailbox.start()

    assert sorted(kept(mailbox)) == sorted(accepted)
