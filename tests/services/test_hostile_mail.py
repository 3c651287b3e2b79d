"""The alerter and mail servers that refuse some mails or some recipients, or that say what no client expects."""

import re
import socketserver
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import Envelope
from alarms import NOW, alarm, deliveries, plain_mailer, predicted, put_frauds, received, text_of
from command_line import call
from confluent_kafka import Message
from conftest import Rig, dead_letter_topic, make_transactions, until

from rehearsal.stack import RECIPIENT, SENDER
from sandbox.mailbox import SPAM, Mailbox, ReceivedMail, messages
from sandbox.processes import Process, free_port
from services.alerter.channels import ByMail
from services.alerter.mail import Composer
from services.alerter.pace import Pace
from shared.errors import Outage
from shared.kafka.messages import headers
from shared.records import Transaction

GREY = "grey@fraud-alarm.example"
OTHERS = ("ana@fraud-alarm.example", "bob@fraud-alarm.example")
QUICK = {"BACKOFF_INITIAL_SECONDS": "0.1", "BACKOFF_MAX_SECONDS": "0.5", "SMTP_TIMEOUT_SECONDS": "4"}
BURSTS = [{"ALERT_BURST": "100"}, {"ALERT_BURST": "0", "ALERT_DIGEST_SECONDS": "1"}]


def every(recipients: tuple[str, ...], frauds: list[Transaction]) -> set[tuple[str, tuple[str, int]]]:
    return {(recipient, each.identity) for recipient in recipients for each in frauds}


def reason(letter: Message) -> str:
    return dict(headers(letter))["dlq-reason"].decode()


def by_mail(port: int, *, recipients: tuple[str, ...] = (RECIPIENT,)) -> ByMail:
    return ByMail(
        plain_mailer(port),
        Composer(sender=SENDER, recipients=recipients),
        group="alerter",
        pace=Pace(burst=100, window_s=60),
        largest_digest=50,
        backoff_initial_s=0.01,
        backoff_max_s=0.05,
    )


def notices(mailbox: Mailbox) -> list[ReceivedMail]:
    """The mails that say which alarms could not be sent."""
    return [mail for mail in messages(mailbox.directory) if "could not be sent" in mail.message["Subject"]]


@pytest.mark.parametrize("burst", BURSTS)
def test_two_of_thirty_alarms_refused_as_spam_are_dead_letters_and_the_others_are_mailed(
    rig: Rig, mailbox: Mailbox, burst: dict[str, str]
) -> None:
    mailbox.misbehave("spam")
    frauds = make_transactions(30)
    spam = frauds[4], frauds[20]
    good = [each for each in frauds if each not in spam]
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), **QUICK, **burst)
    put_frauds(rig, [predicted(each, merchant=f"fraud_Caf\u00e9 {SPAM}") if each in spam else each for each in frauds])

    letters = rig.read(dead_letter_topic(rig.topic_2), 2)
    until(lambda: len(deliveries(mailbox)) >= 28 and len(notices(mailbox)) >= 2, what="28 alarms and 2 notices")

    assert process.stop() == 0
    assert deliveries(mailbox) == dict.fromkeys(every((RECIPIENT,), good), 1)
    assert len(letters) == 2
    for letter in letters:
        assert any(each.trans_num.encode() in letter.value() for each in spam)
        assert re.search(r"answered 55[024] ", reason(letter))
    text = "".join(text_of(notice.message, "plain") for notice in notices(mailbox))
    assert all(text.count(each.trans_num) == 1 for each in spam)
    assert SPAM not in "".join(notice.path.read_text() for notice in notices(mailbox))
    assert "event='outage'" not in rig.log("alerter")


def test_the_only_alarm_may_be_refused_as_spam(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.misbehave("spam")
    (fraud,) = make_transactions(1)
    put_frauds(rig, [predicted(fraud, city=SPAM)])
    rig.start("alerter", SMTP_PORT=str(mailbox.port), **QUICK)

    (letter,) = rig.read(dead_letter_topic(rig.topic_2), 1)

    assert "answered 550 " in reason(letter)
    (notice,) = received(mailbox, 1)
    assert fraud.trans_num in text_of(notice.message, "plain")


def test_a_dead_letter_that_cannot_be_written_repeats_no_notice(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.misbehave("spam")
    put_frauds(rig, [predicted(each, city=SPAM) for each in make_transactions(1)])
    batch = rig.read(rig.topic_2, 1)
    channel = by_mail(mailbox.port)

    outcomes = [channel.handle(batch) for _ in range(3)]

    assert [len(outcome.dead) for outcome in outcomes] == [1, 1, 1]
    assert len(received(mailbox, 1)) == 1


def test_a_greylisted_recipient_gets_each_alarm_once_and_holds_up_nobody(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.misbehave("greylisting")
    frauds = make_transactions(4)
    own = {"SMTP_PORT": str(mailbox.port), "ALERT_TO": ",".join((OTHERS[0], GREY, OTHERS[1]))}
    process = rig.start("alerter", **own, BACKOFF_MAX_SECONDS="10")
    for number, fraud in enumerate(frauds[:3], start=1):
        put_at_ms = time.time() * 1000
        put_frauds(rig, [fraud])
        mails = received(mailbox, number)
        assert mails[-1].received_ms - put_at_ms < 2000
        time.sleep(0.7)  # by then, the recipient is tried again
    assert deliveries(mailbox) == dict.fromkeys(every(OTHERS, frauds[:3]), 1)

    mailbox.misbehave(None)
    until(lambda: len(deliveries(mailbox)) == 9, what="the mails to the third")

    put_frauds(rig, [frauds[3]])
    until(lambda: len(deliveries(mailbox)) == 12, what="the last alarm")
    assert process.stop() == 0
    rig.start("alerter", **own)
    time.sleep(2)
    assert deliveries(mailbox) == dict.fromkeys(every((GREY, *OTHERS), frauds), 1)
    assert "event='outage'" not in rig.log("alerter")


@pytest.mark.parametrize("end", [Process.stop, Process.kill])
@pytest.mark.parametrize("later", [0, 7])
def test_ended_while_a_recipient_is_greylisted_none_is_missing_and_one_mail_is_repeated(
    rig: Rig, mailbox: Mailbox, end: Callable[[Process], object], later: int
) -> None:
    mailbox.misbehave("greylisting")
    frauds = make_transactions(9)
    before = frauds[: 1 + later]
    own = {"ALERT_BURST": "5", "ALERT_DIGEST_SECONDS": "1", "ALERT_TO": ",".join((*OTHERS, GREY)), **QUICK}
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), **own)
    put_frauds(rig, before)
    until(lambda: len(deliveries(mailbox)) == 2 * len(before), what="the others' mails")
    end(process)
    mails = len(list(messages(mailbox.directory)))

    mailbox.misbehave(None)
    rig.start("alerter", SMTP_PORT=str(mailbox.port), **own)
    until(lambda: len(deliveries(mailbox)) == 3 * len(before), what="all of them")
    put_frauds(rig, frauds[8:])

    wanted = every((GREY, *OTHERS), [*before, frauds[8]])
    until(lambda: set(deliveries(mailbox)) == wanted, what="all of them")
    time.sleep(1)
    assert len(list(messages(mailbox.directory))) == mails + 2  # one that repeats, and the new alarm
    assert {count for place, count in deliveries(mailbox).items() if place[0] == GREY} == {1}


def test_while_a_recipient_is_greylisted_a_dead_letter_that_cannot_be_written_is_tried_again(
    rig: Rig, mailbox: Mailbox
) -> None:
    mailbox.misbehave("greylisting")
    (fraud,) = make_transactions(1)
    put_frauds(rig, [fraud])
    rig.put(rig.topic_2, [b"rubbish"], key=fraud.key)
    first, rubbish = rig.read(rig.topic_2, 2)
    channel = by_mail(mailbox.port, recipients=(*OTHERS, GREY))
    assert channel.handle([first]).done == 0

    lost = channel.handle([first, rubbish])
    outcome = channel.handle([first, rubbish])
    assert outcome.delivered
    outcome.delivered()
    again = channel.handle([first, rubbish])

    assert (len(lost.dead), len(outcome.dead), len(again.dead)) == (1, 1, 0)
    assert (lost.done, outcome.done, again.done) == (0, 0, 0)
    mailbox.misbehave(None)
    until(lambda: channel.handle([first, rubbish]).done == 2, what="the third recipient")
    assert deliveries(mailbox) == dict.fromkeys(every((GREY, *OTHERS), [fraud]), 1)


def test_a_flood_while_a_recipient_is_greylisted_does_not_fill_the_batch(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.misbehave("greylisting")
    frauds = make_transactions(90)
    own = {"ALERT_BURST": "0", "ALERT_DIGEST_SECONDS": "0.5", "MAX_BATCH_SIZE": "40", **QUICK}
    rig.start("alerter", SMTP_PORT=str(mailbox.port), ALERT_TO=f"{RECIPIENT},{GREY}", **own)

    put_frauds(rig, frauds)

    until(lambda: set(deliveries(mailbox)) == every((RECIPIENT,), frauds), what="all of them")
    mailbox.misbehave(None)
    until(lambda: set(deliveries(mailbox)) == every((RECIPIENT, GREY), frauds), what="all of them")
    assert set(deliveries(mailbox).values()) == {1}


def test_a_server_that_accepts_two_recipients_a_mail_is_sent_further_mails(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.misbehave("too-many-recipients")
    recipients = tuple(f"{name}@fraud-alarm.example" for name in ("ana", "bob", "cleo", "dan", "eve"))
    frauds = make_transactions(4)
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), ALERT_TO=",".join(recipients))
    put_frauds(rig, frauds)

    until(lambda: len(deliveries(mailbox)) == 20, what="all of them")

    assert process.stop() == 0
    assert deliveries(mailbox) == dict.fromkeys(every(recipients, frauds), 1)
    assert "recipient_deferred" not in rig.log("alerter")


def test_where_only_the_first_recipients_mail_is_accepted_they_do_not_get_it_again() -> None:
    class Handler:
        stored: list[str] = []  # noqa: RUF012

        async def handle_RCPT(
            self, _server: object, _session: object, envelope: Envelope, address: str, _options: object
        ) -> str:
            if len(envelope.rcpt_tos) == 1:
                return "452 4.5.3 Too many recipients"
            envelope.rcpt_tos.append(address)
            return "250 OK"

        async def handle_DATA(self, _server: object, _session: object, envelope: Envelope) -> str:
            if envelope.rcpt_tos[0] == OTHERS[1]:
                return "451 4.3.0 Try again later"
            self.stored += envelope.rcpt_tos
            return "250 OK"

    (fraud,) = make_transactions(1)
    server = Controller(Handler(), hostname="127.0.0.1", port=free_port())
    server.start()
    try:
        message = Composer(sender=SENDER, recipients=OTHERS).single(alarm(fraud), now=NOW)
        assert plain_mailer(server.port).send(message) == [OTHERS[1]]
    finally:
        server.stop()
    assert Handler.stored == [OTHERS[0]]


def test_any_script_arrives_through_a_server_of_seven_bits(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.misbehave("7bit")
    merchant = "Caf\u00e9 \u00dcn\u00efcode \u4e2d\u6587"
    own = {"ALERT_BURST": "1", "ALERT_DIGEST_SECONDS": "1"}
    rig.start("alerter", SMTP_PORT=str(mailbox.port), **own)
    put_frauds(rig, [predicted(each, merchant=f"fraud_{merchant}") for each in make_transactions(3)])

    single, digest = received(mailbox, 2)

    assert merchant in single.message["Subject"]
    for mail in (single, digest):
        assert mail.path.read_bytes().isascii()
        assert merchant in text_of(mail.message, "plain")
        assert merchant in text_of(mail.message, "html")
    (attached,) = digest.message.iter_attachments()
    assert str(attached.get_content()).count(merchant) == 2
    assert "event='outage'" not in rig.log("alerter")


def resident_mb(process: Process) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


def test_an_endless_response_is_an_outage_that_costs_little_memory(rig: Rig, mailbox: Mailbox) -> None:
    frauds = make_transactions(4)
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), **QUICK)
    put_frauds(rig, frauds[:1])
    received(mailbox, 1)
    before_mb = resident_mb(process)

    mailbox.misbehave("endless")
    put_frauds(rig, frauds[1:])
    until(lambda: "response too large" in rig.log("alerter"), timeout_s=10, what="the outage in the log")
    most_mb = 0.0
    until_s = time.monotonic() + 5
    while time.monotonic() < until_s:
        most_mb = max(most_mb, resident_mb(process))
        time.sleep(0.1)
    mailbox.misbehave(None)
    received(mailbox, 4)

    assert process.stop() == 0
    assert most_mb - before_mb < 30
    assert deliveries(mailbox) == dict.fromkeys(every((RECIPIENT,), frauds), 1)
    assert "event='outage_over'" in rig.log("alerter")


@contextmanager
def scripted(responses: dict[str, bytes], *, pause_s: float = 0.0) -> Iterator[int]:
    """A mail server that answers each command with these bytes, one at a time with a pause; yields its port.

    The key "" is the greeting. Other commands are answered as usual.
    """
    usual = {"": b"220 odd.example", "EHLO": b"250-odd.example\r\n250 AUTH LOGIN", "DATA": b"354 go on"}

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):
                self.answer("")
                for line in self.rfile:
                    verb = line[:4].decode("latin-1").strip().upper()
                    self.answer(verb)
                    if verb == "DATA" and "DATA" not in responses:
                        while self.rfile.readline() not in (b".\r\n", b""):
                            pass
                        self.answer(".")

        def answer(self, verb: str) -> None:
            response = responses.get(verb, usual.get(verb, b"250 OK")) + b"\r\n"
            if not pause_s:
                self.wfile.write(response)
                return
            for byte in response:
                self.wfile.write(bytes([byte]))
                time.sleep(pause_s)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_response_that_trickles_in_is_an_outage_after_one_timeout() -> None:
    (message,) = (
        Composer(sender=SENDER, recipients=OTHERS).single(alarm(each), now=NOW) for each in make_transactions(1)
    )
    with scripted({"MAIL": b"250 " + b"x" * 1000}, pause_s=0.01) as port:
        began = time.monotonic()
        with pytest.raises(Outage, match="timed out"):
            plain_mailer(port, timeout_s=1.5).send(message)

    assert time.monotonic() - began < 4


def test_a_prompt_that_is_not_base64_is_one_clear_line(rig: Rig, tmp_path: Path) -> None:
    with Mailbox(tmp_path / "mail", login=("alarm", "secret")) as mailbox:
        mailbox.misbehave("prompt-not-base64")
        own = {"SMTP_PORT": str(mailbox.port), "SMTP_USERNAME": "alarm", "SMTP_PASSWORD": "secret", **QUICK}
        (fraud,) = make_transactions(1)
        put_frauds(rig, [fraud])
        process = rig.start("alerter", **own)
        reason = f"mail server 127.0.0.1:{mailbox.port}: the server's prompt for the login is not base64"
        until(lambda: reason in rig.log("alerter"), what="the outage in the log")

        tested = call("alert-test", cwd=tmp_path, environment=rig.environment | own)
        examined = call("doctor", cwd=tmp_path, environment=rig.environment | own)

        assert (tested.returncode, tested.stdout, tested.stderr) == (1, f"{reason}\n", "")
        assert examined.returncode == 1
        (line,) = [line for line in examined.stdout.splitlines() if "SMTP" in line]
        assert line.startswith(f"failed   SMTP: the {reason}. ")
        assert "Traceback" not in examined.stdout + examined.stderr + rig.log("alerter")
        mailbox.misbehave(None)
        received(mailbox, 1)
        assert process.stop() == 0
        assert deliveries(mailbox) == dict.fromkeys(every((RECIPIENT,), [fraud]), 1)


HOSTILE = b"\x1b]0;owned\x07\x1b[2J\x00\x9b31m\xe2\x80\xaegnp.exe\xe2\x80\xac\r550-x \xff"


@pytest.mark.parametrize(
    "responses",
    [
        {"": b"554 5.7.1 " + HOSTILE},
        {"": HOSTILE},
        {"EHLO": b"550 " + HOSTILE, "HELO": b"550 " + HOSTILE},
        {"AUTH": b"535 5.7.8 " + HOSTILE},
        {"AUTH": b"334 " + HOSTILE},
        {"MAIL": b"550 5.7.1 " + HOSTILE},
        {"RCPT": b"550 5.7.1 " + HOSTILE},
        {"RCPT": b"421 5.7.1 " + HOSTILE},
        {"DATA": b"550 5.7.1 " + HOSTILE},
        {".": b"550 5.7.1 " + HOSTILE},
        {".": b"554 5.6.0 " + HOSTILE},
    ],
)
def test_what_a_server_says_is_printed_harmlessly(
    environment: dict[str, str], tmp_path: Path, responses: dict[str, bytes]
) -> None:
    with scripted(responses) as port:
        own = {"SMTP_PORT": str(port), "SMTP_TIMEOUT_SECONDS": "3"}
        own |= {"SMTP_USERNAME": "alarm", "SMTP_PASSWORD": "secret"}
        tested = call("alert-test", cwd=tmp_path, environment=environment | own)

    assert tested.returncode == 1
    assert tested.stderr == ""
    (line,) = tested.stdout.removesuffix("\n").split("\n")
    assert line.isprintable()
    assert "mail server 127.0.0.1" in line
    assert "\\x" not in line


ENCODED = [
    "=?utf-8?q?x=0ABcc:_a@b=0A=0A<h1>injected</h1>?=",
    "=?UTF-8?Q?x=0D=0ABcc:_a@b=0D=0A=0D=0A<h1>injected</h1>?=",
    "=?utf-8?b?eApCY2M6IGFAYgoKPGgxPmluamVjdGVkPC9oMT4=?=",
    "=?utf-8?B?eA0KQmNjOiBhQGINCg0KPGgxPmluamVjdGVkPC9oMT4=?=",
    "=?utf-8?q?x=0ABcc:?= =?utf-8?q?_a@b=0A=0A<h1>injected</h1>?=",
    " =?utf-8?q?x=0ABcc:?=\t\r\n =?utf-8?q?_a@b=0A=0A<h1>injected</h1>?= ",
    "a =?utf-8*en?q?x=0ABcc:_a@b=0A=0A<h1>injected</h1>?= b",
    "= ?utf-8?q?x=0ABcc:_a@b?=",
    "=\u200b?utf-8?q?x=0ABcc:_a@b=0A=0A<h1>injected</h1>?=",
    "==??utf-8?q?x=0ABcc:_a@b=0A=0A<h1>injected</h1>?=",
    "=?utf-8?q?x\nBcc: a@b\n\n<h1>injected</h1>?=",
]


@pytest.mark.parametrize("text", ENCODED)
def test_encoded_words_in_a_payment_add_no_header_and_no_body(mailbox: Mailbox, text: str) -> None:
    changes = dict.fromkeys(("merchant", "category", "city", "state", "trans_num"), text)
    changes["merchant"] = f"fraud_{text}"
    first, second = (alarm(each, **changes) for each in make_transactions(2))
    mailer = plain_mailer(mailbox.port)
    writer = Composer(sender=SENDER, recipients=[RECIPIENT])
    for message in (
        writer.single(first, now=NOW),
        writer.digest([first, second], now=NOW),
        writer.unsent([first, second], now=NOW),
    ):
        mailer.send(message)

    single, digest, unsent = (mail.path.read_bytes() for mail in received(mailbox, 3))

    assert parts(single) == ["multipart/alternative", "text/plain", "text/html"]
    assert parts(digest) == ["multipart/mixed", "multipart/alternative", "text/plain", "text/html", "text/csv"]
    assert parts(unsent) == ["text/plain"]
    for raw in (single, digest, unsent):
        for rules in (policy.default, policy.compat32):
            found: Any = BytesParser(policy=rules).parsebytes(raw)
            own = {"X-Envelope-To", "Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted", "MIME-Version"}
            body = {"Content-Type"} if found.is_multipart() else {"Content-Type", "Content-Transfer-Encoding"}
            assert Counter(found.keys()) == dict.fromkeys(own | body, 1)
    for raw in (single, digest):
        assert "<h1>" not in text_of(parsed(raw), "html")
    whole = parsed(single)
    assert whole["Subject"].startswith("Fraud alert: $")
    assert whole["Subject"].endswith(f"(card ending {first.prediction.cc_num % 10000:04d})")
    assert (whole["To"], whole["X-Envelope-To"]) == (RECIPIENT, RECIPIENT)


def parsed(raw: bytes) -> EmailMessage:
    return BytesParser(_class=EmailMessage, policy=policy.default).parsebytes(raw)


def parts(raw: bytes) -> list[str]:
    message = parsed(raw)
    assert all(not part.defects for part in message.walk())
    return [part.get_content_type() for part in message.walk()]
