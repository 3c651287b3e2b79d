"""topic_2 to e-mail, with a real SMTP server."""

import base64
import csv
import io
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from threading import Thread
from typing import ClassVar

import msgspec
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import Envelope
from alarms import NOW, alarm, plain_mailer, predicted, put_predictions, received, text_of
from command_line import call
from conftest import Rig, dead_letter_topic, make_transactions, until
from standardwebhooks import Webhook

from rehearsal.stack import RECIPIENT, SENDER
from sandbox.mailbox import Mailbox, ReceivedMail, messages, repeated_mails
from sandbox.processes import free_port
from services.alerter.alarm import fields
from services.alerter.channels import ByMail
from services.alerter.mail import Composer, Mailer, message_id, table
from services.alerter.pace import Pace
from services.alerter.remembered import Remembered
from services.alerter.settings import AlerterSettings
from shared.errors import Outage, Poison, SettingsError
from shared.records import encode_prediction, encode_transaction
from shared.settings import load
from shared.text import one_line


def composer(templates: Path | None = None) -> Composer:
    return Composer(sender=SENDER, recipients=[RECIPIENT], templates=templates)


def mails(count: int) -> list[EmailMessage]:
    return [composer().single(alarm(each), now=NOW) for each in make_transactions(count)]


def by_mail(port: int, *, burst: int = 10, largest_digest: int = 1000) -> ByMail:
    return ByMail(
        plain_mailer(port),
        composer(),
        group="alerter",
        pace=Pace(burst=burst, window_s=60),
        largest_digest=largest_digest,
        backoff_initial_s=0.05,
        backoff_max_s=0.2,
    )


def message_ids(mails: Sequence[ReceivedMail]) -> list[str]:
    return sorted(str(mail.message["Message-ID"]) for mail in mails)


def test_every_fraud_is_mailed_once_and_nothing_else(rig: Rig, mailbox: Mailbox) -> None:
    batch = [(each, int(number % 5 == 0)) for number, each in enumerate(make_transactions(60))]
    put_predictions(rig, batch)
    rig.start("alerter", SMTP_PORT=str(mailbox.port))

    mails = received(mailbox, 12)

    wanted = {message_id(each.identity, sender=SENDER) for each, label in batch if label}
    assert sorted(mail.message["Message-ID"] for mail in mails) == sorted(wanted)


def test_the_mail_says_what_an_analyst_needs_and_no_more(rig: Rig, mailbox: Mailbox) -> None:
    (transaction,) = make_transactions(1)
    fraud = predicted(transaction, amt=1147.91, merchant="fraud_Kihn, Abernathy and Douglas", cc_num=4497913965510030)
    put_predictions(rig, [(fraud, 1)])
    rig.start("alerter", SMTP_PORT=str(mailbox.port))

    (mail,) = received(mailbox, 1)

    message = mail.message
    assert message["Subject"] == "Fraud alert: $1,147.91 at Kihn, Abernathy and Douglas (card ending 0030)"
    assert (message["From"], message["To"]) == (SENDER, RECIPIENT)
    assert message["Auto-Submitted"] == "auto-generated"
    assert abs(message["Date"].datetime.timestamp() - time.time()) < 60
    for kind in ("plain", "html"):
        text = text_of(message, kind)
        for shown in (
            "$1,147.91",
            "Kihn, Abernathy and Douglas",
            fraud.category.replace("_", " "),
            f"{fraud.city}, {fraud.state}",
            f"{fraud.trans_date_trans_time} UTC",
            "**** 0030",
            "97.3%",
            "fraud version 3",
            fraud.trans_num,
        ):
            assert shown in text
    raw = mail.path.read_text()
    assert "4497913965510030" not in raw
    assert fraud.dob not in raw
    assert "4497913965510030" not in rig.log("alerter")


def test_markup_and_line_breaks_are_inert() -> None:
    (transaction,) = make_transactions(1)
    nasty = alarm(transaction, merchant='fraud_<script>alert("x")</script>\r\nBcc: all@example.org', city="A\nB")

    for message in (composer().single(nasty, now=NOW), composer().digest([nasty, nasty], now=NOW)):
        assert message["Bcc"] is None
        assert "\n" not in message["Subject"]
        assert "<script>" not in text_of(message, "html")
        assert "A B" in text_of(message, "plain")


def test_message_ids_are_stable_and_always_valid() -> None:
    assert message_id(("3cb54a48", 1730134684), sender="a@bank.example") == "<3cb54a48.1730134684@bank.example>"
    odd = message_id(("<x>\r\n y", 1), sender="a@bank.example")
    assert odd == message_id(("<x>\r\n y", 1), sender="a@bank.example")
    assert not set(odd[1:-1]) & set("<> \r\n")


def test_while_the_mail_server_is_away_nothing_is_lost_or_dead(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.stop()
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), BACKOFF_MAX_SECONDS="0.5")
    put_predictions(rig, [(each, 1) for each in make_transactions(5)])
    until(lambda: "event='outage'" in rig.log("alerter"), what="the outage in the log")
    assert process.running

    mailbox.start()

    assert len({mail.message["Message-ID"] for mail in received(mailbox, 5)}) == 5
    assert "event='outage_over'" in rig.log("alerter")
    assert "dead_letters=1" not in rig.log("alerter")


@pytest.mark.parametrize("bad_day", ["4xx", "hang"])
def test_while_the_mail_server_has_a_bad_day_nothing_is_lost_or_dead_or_mailed_twice(
    rig: Rig, mailbox: Mailbox, bad_day: str
) -> None:
    environment = {"SMTP_TIMEOUT_SECONDS": "4", "BACKOFF_INITIAL_SECONDS": "0.02", "BACKOFF_MAX_SECONDS": "0.1"}
    frauds = make_transactions(6)
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), **environment)
    put_predictions(rig, [(each, 1) for each in frauds[:3]])
    received(mailbox, 3)

    mailbox.misbehave(bad_day)
    put_predictions(rig, [(each, 1) for each in frauds[3:]])
    until(lambda: "event='outage'" in rig.log("alerter"), what="the outage in the log")
    mailbox.misbehave(None)
    received(mailbox, 6)

    assert process.stop() == 0
    wanted = sorted(message_id(each.identity, sender=SENDER) for each in frauds)
    assert message_ids(received(mailbox, 6)) == wanted
    assert "event='outage_over'" in rig.log("alerter")
    assert "event='dead_letters'" not in rig.log("alerter")


def test_a_recipient_who_is_gone_costs_the_others_nothing(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.misbehave("5xx-one-recipient")
    frauds = make_transactions(2)
    put_predictions(rig, [(each, 1) for each in frauds])
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), ALERT_TO=f"gone@fraud-alarm.example, {RECIPIENT}")

    mails = received(mailbox, 2)

    assert process.stop() == 0
    assert message_ids(mails) == sorted(message_id(each.identity, sender=SENDER) for each in frauds)
    assert {mail.message["X-Envelope-To"] for mail in mails} == {RECIPIENT}
    (first, *_) = [line for line in rig.log("alerter").splitlines() if "event='recipient_refused'" in line]
    assert "level='warning'" in first
    assert "recipient='gone@fraud-alarm.example'" in first
    assert "550" in first
    assert "event='dead_letters'" not in rig.log("alerter")


def test_a_mail_that_is_refused_for_good_is_kept_and_the_next_fraud_is_mailed(
    rig: Rig, refusing: Callable[..., int]
) -> None:
    first, second = make_transactions(2)
    batch = [encode_prediction(encode_transaction(each), 1) for each in (first, second)]
    rig.put(rig.topic_2, batch, key=b"one card")
    rig.start("alerter", SMTP_PORT=str(refusing("554 5.6.0 Message content rejected", "250 OK")))

    (letter,) = rig.read(dead_letter_topic(rig.topic_2), 1)

    assert letter.value() == batch[0]
    until(lambda: "event='alarm_mailed'" in rig.log("alerter"), what="the alarm")
    (line,) = [line for line in rig.log("alerter").splitlines() if "event='alarm_mailed'" in line]
    assert second.trans_num in line


@pytest.mark.parametrize(
    ("alarms", "burst", "answer"),
    [
        (1, "10", "554 5.6.0 unwanted"),
        (1, "10", "552 5.7.0 no"),
        (1, "10", "554 5.2.0 no"),
        (40, "100", "550 5.7.1 spam"),
        (40, "0", "554 5.6.0 unwanted"),
        (40, "0", "550 5.7.1 spam"),
    ],
)
def test_a_mail_server_that_refuses_everything_is_not_taken_out_on_the_alarms(
    rig: Rig, mailbox: Mailbox, refusing: Callable[..., int], alarms: int, burst: str, answer: str
) -> None:
    frauds = make_transactions(alarms)
    put_predictions(rig, [(each, 1) for each in frauds])
    own = {"ALERT_BURST": burst, "ALERT_DIGEST_SECONDS": "1", "BACKOFF_MAX_SECONDS": "0.2"}
    process = rig.start("alerter", SMTP_PORT=str(refusing(answer)), **own)
    until(lambda: process.said("(a plain mail is refused as well)"), what="the outage in the log")
    time.sleep(1.0)
    assert process.stop() == 0

    rig.start("alerter", SMTP_PORT=str(mailbox.port), **own)

    wanted = sorted(each.identity for each in frauds)
    until(lambda: sorted(chain(*named(list(messages(mailbox.directory))))) == wanted, what="all of them")
    assert "event='dead_letters'" not in rig.log("alerter")


def test_a_fraud_that_lies_twice_on_the_topic_is_mailed_once(rig: Rig, mailbox: Mailbox) -> None:
    first, second = make_transactions(2)
    rig.put(
        rig.topic_2,
        [encode_prediction(encode_transaction(each), 1) for each in (first, first, second)],
        key=b"one card",
    )
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port))

    mails = received(mailbox, 2)

    assert process.stop() == 0
    assert message_ids(mails) == sorted(message_id(each.identity, sender=SENDER) for each in (first, second))
    assert rig.log("alerter").count("event='alarm_repeats_skipped'") == 1


def test_a_fraud_whose_commit_failed_is_redelivered_and_is_not_mailed_again(rig: Rig, mailbox: Mailbox) -> None:
    channel = by_mail(mailbox.port)
    batch = [
        encode_prediction(encode_transaction(each), label)
        for each, label in zip(make_transactions(4), (1, 0, 1, 0), strict=True)
    ]
    rig.put(rig.topic_2, batch, key=b"one card")
    messages = rig.read(rig.topic_2, 4)

    done = [channel.handle(messages).done for _ in range(3)]

    assert done == [1, 3, 4]
    assert len(received(mailbox, 2)) == 2


def test_the_frauds_mailed_longest_ago_are_forgotten() -> None:
    identities = [(str(number), number) for number in range(4)]
    mailed = Remembered(3)
    for identity in (*identities, identities[3]):
        mailed.add(identity)

    assert [identity in mailed for identity in identities] == [False, True, True, True]


def named(mails: Sequence[ReceivedMail]) -> list[list[tuple[str, int]]]:
    """For each mail, the transactions that it names."""
    return [mail.alarms for mail in mails]


@pytest.mark.alone
def test_a_flood_becomes_a_few_mails_that_name_every_fraud_once(rig: Rig, mailbox: Mailbox) -> None:
    frauds = make_transactions(5000)
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), ALERT_BURST="10", ALERT_DIGEST_SECONDS="2")
    put_at_ms = time.time() * 1000
    put_predictions(rig, [(each, 1) for each in frauds])

    until(lambda: sum(map(len, named(list(messages(mailbox.directory))))) >= 5000, what="all of them")

    assert process.stop() == 0
    mails = list(messages(mailbox.directory))
    assert mails[0].received_ms - put_at_ms < 1000
    assert len(mails) <= 30
    assert sorted(chain(*named(mails))) == sorted(each.identity for each in frauds)
    assert "event='dead_letters'" not in rig.log("alerter")


def test_a_flood_among_many_others_is_gathered_all_the_same(rig: Rig, mailbox: Mailbox) -> None:
    batch = make_transactions(8000)
    labels = [int(number % 50 == 0) for number in range(len(batch))]
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), ALERT_BURST="2", ALERT_DIGEST_SECONDS="15")
    put_predictions(rig, list(zip(batch, labels, strict=True)))

    until(lambda: sum(map(len, named(list(messages(mailbox.directory))))) >= 160, what="all of them")

    assert process.stop() == 0
    assert len(list(messages(mailbox.directory))) <= 4
    again = rig.start("alerter", SMTP_PORT=str(mailbox.port))  # everything was committed, also what lies between them
    put_predictions(rig, [(batch[0], 0)])
    until(lambda: "total=1 " in f"{rig.log('alerter')} " or again.said("records=1 "), what="the one that is new")
    assert again.stop() == 0


def test_killed_in_a_flood_it_loses_none_and_repeats_those_of_one_mail_at_the_most(rig: Rig, mailbox: Mailbox) -> None:
    frauds = make_transactions(3000)
    own = {"SMTP_PORT": str(mailbox.port), "ALERT_BURST": "5", "ALERT_DIGEST_SECONDS": "1", "MAX_BATCH_SIZE": "700"}
    process = rig.start("alerter", **own)
    put_predictions(rig, [(each, 1) for each in frauds])
    received(mailbox, 7)
    process.kill()
    rig.start("alerter", **own)

    wanted = sorted(each.identity for each in frauds)
    until(lambda: sorted(set(chain(*named(list(messages(mailbox.directory)))))) == wanted, what="all of them")

    assert len(repeated_mails(list(messages(mailbox.directory)))) <= 1


def test_what_was_mailed_in_a_digest_and_not_committed_is_mailed_in_one_again(rig: Rig, mailbox: Mailbox) -> None:
    put_predictions(rig, [(each, 1) for each in make_transactions(300)])
    batch = rig.read(rig.topic_2, 300)

    for _ in "killed before the commit", "started again":
        channel = by_mail(mailbox.port)
        done = channel.handle(batch).done
        assert done == 0  # they are gathered for a moment
        time.sleep(1.05)
        assert channel.handle(batch).done == 300

    assert list(map(len, named(received(mailbox, 2)))) == [300, 300]


def test_a_flood_waits_for_the_mail_server_and_then_is_mailed_once(rig: Rig, mailbox: Mailbox) -> None:
    frauds = make_transactions(1000)
    mailbox.stop()
    own = {"ALERT_BURST": "3", "ALERT_DIGEST_SECONDS": "1", "BACKOFF_MAX_SECONDS": "0.5"}
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), **own)
    put_predictions(rig, [(each, 1) for each in frauds])
    until(lambda: "event='outage'" in rig.log("alerter"), what="the outage in the log")

    mailbox.start()
    until(lambda: sum(map(len, named(list(messages(mailbox.directory))))) >= 1000, what="all of them")

    assert process.stop() == 0
    assert sorted(chain(*named(list(messages(mailbox.directory))))) == sorted(each.identity for each in frauds)
    assert "event='dead_letters'" not in rig.log("alerter")


def test_a_digest_that_is_too_big_is_halved(rig: Rig) -> None:
    put_predictions(rig, [(each, 1) for each in make_transactions(200)])
    batch = rig.read(rig.topic_2, 200)
    sizes: list[int] = []

    class Handler:
        async def handle_DATA(self, _server: object, _session: object, envelope: Envelope) -> str:
            sizes.append(len(envelope.content or b""))
            return "250 OK"

    server = Controller(Handler(), hostname="127.0.0.1", port=free_port(), data_size_limit=150_000)
    server.start()
    try:
        channel = by_mail(server.port, burst=0, largest_digest=200)
        outcome = channel.handle(batch)
    finally:
        server.stop()

    assert (outcome.done, list(outcome.dead)) == (200, [])
    assert len(sizes) > 1
    assert max(sizes) <= 150_000


def test_a_server_that_refuses_every_digest_is_not_sent_thousands_of_mails(
    rig: Rig, refusing: Callable[..., int]
) -> None:
    put_predictions(rig, [(each, 1) for each in make_transactions(200)])
    batch = rig.read(rig.topic_2, 200)

    with pytest.raises(Outage, match=r"answered 554 no attachments \(a plain mail is refused as well\)"):
        by_mail(refusing("554 no attachments"), burst=0, largest_digest=200).handle(batch)


def test_a_fraud_that_comes_twice_is_once_in_a_digest(rig: Rig, mailbox: Mailbox) -> None:
    frauds = make_transactions(20)
    put_predictions(rig, [(each, 1) for each in (*frauds, *frauds[:5])])
    channel = by_mail(mailbox.port, burst=0, largest_digest=25)
    batch = rig.read(rig.topic_2, 25)

    channel.handle(batch)
    time.sleep(1.05)
    channel.handle(batch)

    (digest,) = named(received(mailbox, 1))
    assert sorted(digest) == sorted(each.identity for each in frauds)


def test_what_was_gathered_is_mailed_though_nothing_follows(rig: Rig, mailbox: Mailbox) -> None:
    frauds = make_transactions(4)
    rig.start("alerter", SMTP_PORT=str(mailbox.port), ALERT_BURST="1", ALERT_DIGEST_SECONDS="2")
    put_predictions(rig, [(each, 1) for each in frauds])

    single, digest = received(mailbox, 2)

    assert len(named([single])[0]) == 1
    assert len(named([digest])[0]) == 3
    assert digest.received_ms - single.received_ms > 1500


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_goes_at_once_the_rest_is_gathered_and_one_comes_back_with_each_window() -> None:
    clock = Clock()
    pace = Pace(burst=2, window_s=60, clock=clock)
    for _ in range(2):
        assert pace.allows_single()
        pace.single_sent()
    assert not pace.allows_single()
    assert pace.gather_s() == 60
    clock.now = 60
    assert not pace.allows_single()  # what was gathered comes first
    assert pace.gather_s() == 0
    pace.digest_sent()
    assert pace.allows_single()
    pace.single_sent()
    assert not pace.allows_single()
    clock.now = 1e6
    for _ in range(2):
        assert pace.allows_single()
        pace.single_sent()
    assert not pace.allows_single()


def test_a_digest_groups_by_card_the_dearest_first() -> None:
    first, second, third = make_transactions(3)
    one_card = {"cc_num": 4497913965510030}
    batch = [
        alarm(first, amt=10.0, **one_card),
        alarm(second, amt=500.0, cc_num=4497913965511111),
        alarm(third, amt=700.0, **one_card),
    ]

    message = composer().digest(batch, now=NOW)

    assert message["Subject"] == "Fraud digest: 3 alarms on 2 cards, $1,210.00"
    text = text_of(message, "plain")
    assert text.index("Card **** 0030, 2 alarms, $710.00") < text.index("Card **** 1111, 1 alarm, $500.00")
    assert text_of(message, "html").count("Card ****") == 2
    raw = message.as_string()
    for each in batch:
        assert str(each.prediction.cc_num) not in raw
        assert each.prediction.dob not in raw


@pytest.mark.parametrize(
    "start", ["=HYPERLINK(0)", "+1", "-1", "@x", " =1", "\t=1", "\r=1", "\uff1d1", "a;=1", "a | +1", 'a;"=1;']
)
def test_no_text_in_the_table_starts_a_formula(start: str) -> None:
    (transaction,) = make_transactions(1)
    texts = ("merchant", "category", "city", "state", "trans_num")

    (row,) = csv.DictReader(io.StringIO(table([alarm(transaction, **dict.fromkeys(texts, start))])))

    for name in texts:
        assert re.search('(^|[;\t|])[\\s"]*[=+@\uff1d-]', row[name]) is None


def test_long_names_and_emoji_are_shown_and_break_nothing(mailbox: Mailbox) -> None:
    first, second = (
        alarm(each, merchant="\U0001f4a9" * 10_000, city="\u202egro.elpmaxe") for each in make_transactions(2)
    )
    mailer = plain_mailer(mailbox.port)
    mailer.send(composer().single(first, now=NOW))
    mailer.send(composer().digest([first, second], now=NOW))

    for mail in received(mailbox, 2):
        assert "\U0001f4a9" * 100 in text_of(mail.message, "plain")
        assert "\u202e" not in text_of(mail.message, "html")
        assert max(map(len, mail.path.read_bytes().split(b"\r\n"))) <= 998


def test_alarms_of_a_card_form_a_thread() -> None:
    first, second, other = (
        alarm(each, cc_num=card) for each, card in zip(make_transactions(3), (11, 11, 12), strict=True)
    )
    writer = composer()

    begun, follows, alone = (writer.single(each, now=NOW) for each in (first, second, other))

    assert begun["References"] is alone["References"] is None
    assert follows["References"] == follows["In-Reply-To"] == begun["Message-ID"]


def test_an_operators_templates_replace_the_mails_own(tmp_path: Path) -> None:
    (transaction,) = make_transactions(1)
    (tmp_path / "alert.txt").write_text("Pay attention: {{ alarm.card }}")

    message = composer(tmp_path).single(alarm(transaction), now=NOW)

    assert text_of(message, "plain").startswith("Pay attention: **** ")
    assert "Fraud suspected" in text_of(message, "html")


def test_a_template_that_fails_on_an_alarm_is_not_taken_out_on_it(tmp_path: Path) -> None:
    (tmp_path / "alert.txt").write_text("{{ 1 / (alarm.card[-4:] | int - 30) }}")
    (transaction,) = make_transactions(1)
    writer = composer(tmp_path)

    message = writer.single(alarm(transaction, cc_num=4497913965510030), now=NOW)

    assert "Fraud suspected" in text_of(message, "plain")


class Hook(BaseHTTPRequestHandler):
    """Answers with the next of the statuses, then with the last; keeps what it accepted."""

    statuses: ClassVar[list[int]] = [200]
    accepted: ClassVar[list[tuple[dict[str, str], bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status == 200:
            self.accepted.append(({name.lower(): text for name, text in self.headers.items()}, body))
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hook() -> Iterator[tuple[type[Hook], str]]:
    """A web server that takes posts, and its URL."""

    class Own(Hook):
        statuses: ClassVar[list[int]] = [200]
        accepted: ClassVar[list[tuple[dict[str, str], bytes]]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield Own, f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    thread.join()
    server.server_close()


SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()


def posted(hook: type[Hook]) -> list[tuple[str, int]]:
    bodies = [msgspec.json.decode(body) for _, body in hook.accepted]
    return sorted((each["trans_num"], each["unix_time"]) for body in bodies for each in body["data"]["alarms"])


def test_a_webhook_is_sent_every_fraud_signed_and_tried_again(rig: Rig, hook: tuple[type[Hook], str]) -> None:
    server, url = hook
    server.statuses = [503, 429, 200]
    frauds = make_transactions(1200)
    put_predictions(rig, [(each, 1) for each in frauds])
    alone = {"SMTP_HOST": "", "ALERT_FROM": "", "ALERT_TO": "", "WEBHOOK_URL": url, "WEBHOOK_SECRET": SECRET}
    process = rig.start("alerter", BACKOFF_MAX_SECONDS="0.3", **alone)

    until(lambda: len(posted(server)) >= 1200, what="all of them")

    assert process.stop() == 0
    assert posted(server) == sorted(each.identity for each in frauds)
    assert sum(map(int, re.findall(r"event='alarms_posted' alarms=(\d+)", rig.log("alerter")))) == 1200
    for headers, body in server.accepted:
        assert Webhook(SECRET).verify(body, headers)["data"]["alarms"]  # raises where the signature is another's
        assert all(str(each.cc_num).encode() not in body for each in frauds[:50])


def test_a_broken_webhook_holds_up_no_mail_and_catches_up(
    rig: Rig, mailbox: Mailbox, hook: tuple[type[Hook], str]
) -> None:
    server, url = hook
    server.statuses = [500]
    frauds = make_transactions(3)
    put_predictions(rig, [(each, 1) for each in frauds])
    own = {"WEBHOOK_URL": url, "WEBHOOK_SECRET": SECRET, "BACKOFF_MAX_SECONDS": "0.3"}
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), **own)

    received(mailbox, 3)
    until(lambda: "answered 500" in rig.log("alerter"), what="the outage in the log")
    server.statuses = [200]
    until(lambda: len(posted(server)) == 3, what="all of them posted")

    assert process.stop() == 0
    assert len(received(mailbox, 3)) == 3


def test_an_alarm_whose_content_a_webhook_refuses_is_kept(rig: Rig, hook: tuple[type[Hook], str]) -> None:
    server, url = hook
    server.statuses = [422, 200]
    batch = [encode_prediction(encode_transaction(each), 1) for each in make_transactions(1)]
    rig.put(rig.topic_2, batch)
    rig.start("alerter", SMTP_HOST="", WEBHOOK_URL=url, WEBHOOK_SECRET=SECRET)

    (letter,) = rig.read(dead_letter_topic(rig.topic_2), 1)

    assert letter.value() == batch[0]


def test_a_sample_goes_through_each_channel_and_what_happened_is_said(
    rig: Rig, mailbox: Mailbox, hook: tuple[type[Hook], str], tmp_path: Path
) -> None:
    server, url = hook
    server.statuses = [401]
    environment = rig.environment | {"SMTP_PORT": str(mailbox.port), "WEBHOOK_URL": url, "WEBHOOK_SECRET": SECRET}

    done = call("alert-test", cwd=tmp_path, environment=environment)

    assert done.returncode == 1
    assert done.stdout.splitlines() == ["mail: accepted", "webhook at 127.0.0.1 answered 401 Unauthorized"]
    (mail,) = received(mailbox, 1)
    assert "Test alarm" in mail.message["Subject"]


def test_a_post_says_what_a_mail_says() -> None:
    (transaction,) = make_transactions(1)
    found = fields(alarm(transaction, cc_num=4497913965510030))

    assert found["card"] == "**** 0030"
    assert (found["trans_num"], found["unix_time"]) == transaction.identity
    assert transaction.dob not in str(found)


def test_rubbish_is_kept_and_the_next_fraud_is_mailed(rig: Rig, mailbox: Mailbox) -> None:
    rig.put(rig.topic_2, [b"rubbish"])
    put_predictions(rig, [(make_transactions(1)[0], 1)])
    rig.start("alerter", SMTP_PORT=str(mailbox.port))

    received(mailbox, 1)

    assert rig.read(dead_letter_topic(rig.topic_2), 1)[0].value() == b"rubbish"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a self-signed certificate for localhost, in one file."""
    path = tmp_path / "server.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            *subject,
            "-keyout",
            path,
            "-out",
            path,
        ],
        check=True,
        capture_output=True,
    )
    return path


@pytest.mark.server
def test_starttls_and_login(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = mails(1)
    with Mailbox(tmp_path / "secure", login=("alarm", "secret"), certificate=certificate) as server:

        def mailer(password: str, host: str = "localhost") -> Mailer:
            return Mailer(
                host=host, port=server.port, tls="starttls", timeout_s=20, username="alarm", password=password
            )

        with pytest.raises(Outage, match="certificate refused: self-signed"):
            mailer("secret").send(message)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(Outage, match=r"certificate refused: (Hostname|IP address) mismatch"):
            mailer("secret", host="127.0.0.1").send(message)
        with pytest.raises(Outage, match="answered 535") as refusal:
            mailer("wrong").send(message)
        assert "wrong" not in str(refusal.value)
        mailer("secret").send(message)

        assert len(received(server, 1)) == 1


def test_a_connection_that_the_server_closed_is_opened_again(mailbox: Mailbox) -> None:
    mailer = plain_mailer(mailbox.port)
    for message in mails(2):
        mailer.send(message)
        mailbox.stop()
        mailbox.start()

    assert len(received(mailbox, 2)) == 2


@pytest.mark.parametrize("reused", [False, True])
def test_a_server_that_hangs_is_an_outage_after_one_timeout(mailbox: Mailbox, reused: bool) -> None:
    mailer = plain_mailer(mailbox.port, timeout_s=1.5)
    earlier, message = mails(2)
    if reused:
        mailer.send(earlier)
    mailbox.misbehave("hang")
    began = time.monotonic()

    with pytest.raises(Outage, match=r"cannot reach the mail server .*timed out"):
        mailer.send(message)

    assert 1.4 < time.monotonic() - began < 2.9
    mailbox.misbehave(None)
    mailer.send(message)
    mailbox.stop()
    assert message_ids(received(mailbox, 1)).count(message["Message-ID"]) == 1


def test_a_refusal_for_now_is_an_outage_at_any_stage_and_the_mail_is_sent_once(mailbox: Mailbox) -> None:
    mailer = plain_mailer(mailbox.port)
    (message,) = mails(1)
    mailbox.misbehave("4xx")
    for _ in range(12):  # each code at each stage
        with pytest.raises(Outage, match=r"mail server.* 4[25]"):
            mailer.send(message)

    mailbox.misbehave(None)
    mailer.send(message)

    mailbox.stop()
    assert message_ids(received(mailbox, 1)) == [message["Message-ID"]]


@pytest.fixture
def refusing() -> Iterator[Callable[..., int]]:
    """A mail server that answers each message with the next of these lines, then with the last; returns its port."""
    servers: list[Controller] = []

    def start(*answers: str) -> int:
        following = chain(answers, repeat(answers[-1]))

        class Handler:
            async def handle_DATA(self, *_: object) -> str:
                return next(following)

        servers.append(Controller(Handler(), hostname="127.0.0.1", port=free_port()))
        servers[-1].start()
        return servers[-1].port

    yield start
    for server in servers:
        server.stop()


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("451 4.3.0 Try again later", Outage),
        ("550 5.4.5 Daily user sending limit exceeded", Outage),
        ("550 5.7.1 Sender not allowed", Outage),
        ("554 5.6.0 Message content rejected", Poison),
        ("552 5.3.4 Message too big", Poison),
        ("554 Transaction failed", Poison),
    ],
)
def test_a_refusal_is_about_this_message_or_about_all(
    refusing: Callable[..., int], answer: str, verdict: type[Exception]
) -> None:
    (message,) = mails(1)
    mailer = plain_mailer(refusing(answer))

    with pytest.raises(verdict, match="answered " + answer[:3]):
        mailer.send(message)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"SMTP_HOST": ""}, "SMTP_HOST"),
        ({"ALERT_TO": ""}, "ALERT_TO"),
        ({"ALERT_BURST": "-1"}, "ALERT_BURST"),
        ({"ALERT_TEMPLATES": "/nowhere"}, "ALERT_TEMPLATES"),
        ({"WEBHOOK_URL": "https://example.org"}, "WEBHOOK_SECRET"),
        ({"WEBHOOK_URL": "https://example.org", "WEBHOOK_SECRET": "whsec_no base64 at all"}, "WEBHOOK_SECRET"),
        ({"WEBHOOK_URL": "example.org"}, "WEBHOOK_URL"),
        (
            {
                "WEBHOOK_URL": "https://example.org",
                "WEBHOOK_SECRET": "x" * 16,
                "WEBHOOK_GROUP": "a",
                "ALERTER_GROUP": "a",
            },
            "WEBHOOK_GROUP",
        ),
        ({"ALERT_TO": "somebody"}, "ALERT_TO"),
        ({"ALERT_TO": "a@"}, "ALERT_TO"),
        ({"ALERT_TO": ","}, "ALERT_TO"),
        ({"ALERT_FROM": "Fraud Alarm"}, 'ALERT_FROM: "Fraud Alarm" is not an e-mail address'),
        ({"ALERT_TO": "a@x.example, bob@y.example."}, 'ALERT_TO: "bob@y.example." is not an e-mail address'),
        ({"SMTP_TIMEOUT_SECONDS": "0"}, "SMTP_TIMEOUT_SECONDS"),
        ({"SMTP_PASSWORD": "gehe\u00efm"}, "SMTP_PASSWORD"),
        ({"BACKOFF_INITIAL_SECONDS": "0"}, "BACKOFF_INITIAL_SECONDS"),
    ],
)
def test_a_wrong_setting_is_named_at_the_start(rig: Rig, wrong: dict[str, str], named: str) -> None:
    process = rig.start("alerter", ready=False, **wrong)

    assert process.wait(90) == 2
    assert process.last_line().startswith(f"alerter: {named}")
    assert "gehe" not in rig.log("alerter")


@pytest.mark.parametrize(
    "wrong",
    [
        "bob@y.example.",
        "a;b@x.example",
        "a b@x.example",
        "Ana <a@x.example>",
        "<a@x.example>",
        "a@x.example b@x.example",
        "a@x.example\r\nBcc: b@x.example",
        "a..b@x.example",
        "a@-x.example",
        "caf\u00e9@x.example",
        "=?utf-8?q?a=2Cb?=@x.example",
        "a@",
    ],
)
def test_what_is_not_an_address_is_refused_by_name(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ALERT_TO", "ALERT_FROM":
        with monkeypatch.context() as patch, pytest.raises(SettingsError) as refused:
            patch.setenv(name, wrong)
            load(AlerterSettings)
        assert str(refused.value) == f'{name}: "{one_line(wrong)}" is not an e-mail address'


def test_addresses_are_used_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALERT_TO", "a@M\u00dcNCHEN.example, root@localhost,ops@mail.local , b+c@[127.0.0.1]")

    assert load(AlerterSettings).alert_to == (
        "a@xn--mnchen-3ya.example",
        "root@localhost",
        "ops@mail.local",
        "b+c@[127.0.0.1]",
    )
