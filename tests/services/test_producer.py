"""The payments API to topic_1: every bad day of the API, a real broker."""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import Rig, dead_letter_topic, make_transactions, until

from sandbox.payments_api import PATH, PaymentsApi
from services.producer.api import fetch, retry_after_s
from services.producer.journal import Journal, open_journals
from shared.errors import Outage, SettingsError
from shared.http import Client
from shared.kafka.messages import Record, headers
from shared.records import RAW_COLUMNS, encode_transaction, read_split, read_topic_1

QUICK = {"BACKOFF_INITIAL_SECONDS": "0.05", "BACKOFF_MAX_SECONDS": "0.1"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Callable[..., PaymentsApi]]:
    started: list[PaymentsApi] = []

    def start(*options: str) -> PaymentsApi:
        started.append(PaymentsApi(*options, log=tmp_path / "api.log").start())
        return started[-1]

    yield start
    for each in started:
        each.stop()


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serving() -> Iterator[Callable[[type[Quiet]], str]]:
    """Servers with such handlers, by their URLs."""
    servers: list[HTTPServer] = []

    def start(handler: type[Quiet]) -> str:
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}{PATH}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def slow(serving: Callable[[type[Quiet]], str]) -> Callable[[bytes, float], str]:
    """A server that waits so many seconds before its headers, and again before each piece of eight bytes."""

    def start(body: bytes, pause_s: float) -> str:
        class Handler(Quiet):
            def do_GET(self) -> None:
                time.sleep(pause_s)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(OSError):  # who asked may have had enough
                    for begin in range(0, len(body), 8):
                        time.sleep(pause_s)
                        self.wfile.write(body[begin : begin + 8])

        return serving(Handler)

    return start


@pytest.fixture
def answering(serving: Callable[[type[Quiet]], str]) -> Callable[[Sequence[tuple[int, dict[str, str], bytes]]], str]:
    """A server that gives these answers (status, headers, body), one a call, the last one for ever."""

    def start(answers: Sequence[tuple[int, dict[str, str], bytes]]) -> str:
        left = list(answers)

        class Handler(Quiet):
            def do_GET(self) -> None:
                status, more, body = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | more).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        return serving(Handler)

    return start


def row(number: int, **changes: Any) -> list[Any]:
    transaction = make_transactions(number + 1)[number]
    values = {name: getattr(transaction, name, None) for name in RAW_COLUMNS}
    return [*(values | {"current_time": transaction.unix_time * 1000} | changes).values()]


def answer(*rows: list[Any]) -> tuple[int, dict[str, str], bytes]:
    table = {"columns": RAW_COLUMNS, "index": list(range(len(rows))), "data": rows}
    return 200, {}, json.dumps(json.dumps(table)).encode()


def test_what_the_api_serves_lies_on_topic_1_once_and_under_its_card(rig: Rig, api: Callable[..., PaymentsApi]) -> None:
    source = api("--transactions", "700", "--rate", "0", "--seed", "3")
    rig.start("producer", API_URL=source.url)

    messages = rig.read(rig.topic_1, 700)

    assert len({read_topic_1(message.value()).transactions[0].identity for message in messages}) == len(messages) == 700
    for message in messages:
        (transaction,) = read_topic_1(message.value()).transactions
        assert message.key() == transaction.key
        assert message.value() == encode_transaction(transaction)


def test_a_misbehaving_api_costs_nothing_but_time(rig: Rig, api: Callable[..., PaymentsApi]) -> None:
    kinds = "5xx,429,timeout,html,broken-json,repeats"
    options = ("--transactions", "300", "--rate", "0", "--max-rows", "10", "--seed", "3", "--confirmed")
    source = api(*options, "--misbehave", kinds, "--misbehave-share", "0.4", "--misbehave-seed", "5")
    process = rig.start("producer", API_URL=source.url, API_TIMEOUT_SECONDS="1", **QUICK)

    messages = rig.read(rig.topic_1, 300, timeout_s=60)

    assert len(messages) == 300
    assert process.running
    log = rig.log("producer")
    assert {"HTTP 503", "HTTP 429"} <= set(re.findall(r"HTTP \d+", log))
    assert "not JSON" in log
    assert "Traceback" not in log


def test_a_slow_answer_that_is_whole_in_time_is_taken(slow: Callable[[bytes, float], str]) -> None:
    with Client() as client:
        answer = fetch(client, slow(b"the rows", 0.8), timeout_s=10.0, most_bytes=100)
    assert answer.body == b"the rows"
    assert not answer.cut


def test_an_answer_without_end_is_an_outage(slow: Callable[[bytes, float], str]) -> None:
    with Client() as client, pytest.raises(Outage, match="no complete response within 1 s"):
        fetch(client, slow(b"the rows" * 8, 0.3), timeout_s=1.0, most_bytes=100)


def test_a_bad_row_is_kept_and_its_neighbours_go_on(
    rig: Rig, answering: Callable[[Sequence[tuple[int, dict[str, str], bytes]]], str]
) -> None:
    url = answering([answer(row(0), row(1, amt=None), row(2)), answer()])
    rig.start("producer", API_URL=url, POLL_INTERVAL_SECONDS="0.2")

    good = rig.read(rig.topic_1, 2)
    (dead,) = rig.read(dead_letter_topic(rig.topic_1), 1)

    wanted = make_transactions(3)
    assert {message.value() for message in good} == {encode_transaction(wanted[0]), encode_transaction(wanted[2])}
    assert b"$.amt" in (dict(headers(dead))["dlq-reason"] or b"")
    fixed = (dead.value() or b"").replace(b"null", b"12.5")
    assert read_split(fixed).transactions[0].identity == wanted[1].identity


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ((200, {}, b""), "HTTP 200 without content"),
        ((200, {}, b"<html>sleeping dyno</html>"), "not JSON"),
        ((503, {}, b""), "HTTP 503"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "HTTP 302, a redirect, which is not followed"),
        ((200, {"Content-Length": "5000"}, b"cut short"), "event='outage'"),
    ],
)
def test_a_useless_answer_is_one_line_and_the_next_one_counts(
    rig: Rig,
    answering: Callable[[Sequence[tuple[int, dict[str, str], bytes]]], str],
    bad: tuple[int, dict[str, str], bytes],
    said: str,
) -> None:
    url = answering([bad, answer(row(0)), answer()])
    process = rig.start("producer", API_URL=url, **QUICK)

    (message,) = rig.read(rig.topic_1, 1)

    assert message.value() == encode_transaction(make_transactions(1)[0])
    warnings = [line for line in rig.log("producer").splitlines() if "event='outage'" in line]
    assert len(warnings) == 1
    assert said in warnings[0]
    assert process.running


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (json.dumps({"columns": ["temperature"], "data": [[21]]}).encode(), b"wrong columns"),
        (b"[1, 2]", b"not in split form"),
        (b"<html>sleeping dyno</html>", b"not JSON"),
    ],
)
def test_an_answer_of_another_kind_is_kept_once(
    rig: Rig,
    answering: Callable[[Sequence[tuple[int, dict[str, str], bytes]]], str],
    body: bytes,
    said: bytes,
) -> None:
    url = answering([(200, {}, body), (200, {}, body), answer(row(0)), answer()])
    rig.start("producer", API_URL=url, **QUICK)

    rig.read(rig.topic_1, 1)
    (letter,) = rig.read(dead_letter_topic(rig.topic_1), 1)

    assert letter.value() == body
    found = dict(headers(letter))
    assert said in (found["dlq-reason"] or b"")
    assert found["dlq-http-status"] == b"200"
    assert b"Content-Length" in (found["dlq-http-headers"] or b"")


def test_retry_after_is_heeded(
    rig: Rig, answering: Callable[[Sequence[tuple[int, dict[str, str], bytes]]], str]
) -> None:
    url = answering([(429, {"Retry-After": "2"}, b""), answer(row(0)), answer()])
    began = time.monotonic()
    rig.start("producer", API_URL=url, **QUICK)

    rig.read(rig.topic_1, 1)

    assert time.monotonic() - began >= 2.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("7", 7),
        ("-3", 0),
        ("86400", 300),
        ("soon", 0),
        ("Wed, 21 Oct 2015 07:28:00 +9999999999999999", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ],
)
def test_retry_after_in_all_its_forms(header: str | None, seconds: float) -> None:
    assert retry_after_s(header) == seconds


def test_sigterm_flushes_what_was_fetched(rig: Rig, api: Callable[..., PaymentsApi]) -> None:
    source = api("--rate", "2000", "--seed", "3")
    with (rig.directory / "client.properties").open("a") as file:
        file.write("linger.ms=2000\n")  # so that much waits when the signal comes
    process = rig.start("producer", API_URL=source.url)
    until(lambda: source.status()["served"] > 1000, what="some transactions")

    assert process.stop() == 0

    assert len(rig.read(rig.topic_1, source.status()["served"])) == source.status()["served"]
    assert "left_for_later" not in rig.log("producer")


def test_it_polls_at_its_interval(rig: Rig, api: Callable[..., PaymentsApi]) -> None:
    source = api("--seed", "3")  # one fresh row a call
    rig.start("producer", API_URL=source.url, POLL_INTERVAL_SECONDS="0.5")
    began = time.monotonic()
    until(lambda: source.status()["served"] >= 5, what="five polls")

    assert 1.5 <= time.monotonic() - began <= 5


def entry(number: int) -> tuple[bytes, Record]:
    return str(number).encode(), Record("topic", str(number).encode(), b"key", [("header", b"value")])


def test_the_journal_keeps_what_is_new_in_order_until_it_is_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "file", remembered=10)
    assert journal.add([entry(1), entry(1), entry(2)]) == 2
    assert journal.add([entry(2), entry(3)]) == 1
    first, *others = journal.waiting()
    assert [first.record, *(each.record for each in others)] == [entry(1)[1], entry(2)[1], entry(3)[1]]
    journal.written([first])
    assert journal.count() == 2
    journal.close()
    assert journal.count() == 2  # of a file that cannot be read, what was known last

    again = Journal(tmp_path / "file", remembered=10)
    assert again.id == journal.id
    assert [each.number for each in again.waiting()] == [each.number for each in others]
    assert again.count() == 2
    assert again.add([entry(1)]) == 0
    again.close()


def test_the_journal_forgets_the_oldest_that_are_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "file", remembered=3)
    journal.add([entry(number) for number in range(5)])
    assert journal.count() == 5  # whatever waits is kept
    journal.written(journal.waiting())
    assert journal.add([entry(5)]) == 1
    assert journal.add([entry(4)]) == 0
    assert journal.add([entry(0)]) == 1
    journal.close()


def test_each_replica_has_a_journal_of_its_own(tmp_path: Path) -> None:
    (first,), (second,) = (open_journals(tmp_path / "new", remembered=10) for _ in range(2))
    assert first.id != second.id
    first.close()
    (third,) = open_journals(tmp_path / "new", remembered=10)
    assert third.id == first.id
    for each in (second, third):
        each.close()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").glob("*.sqlite")} == {0o600}


def test_a_journal_that_was_left_behind_is_found_while_something_waits_in_it(tmp_path: Path) -> None:
    ids = set()
    replicas = [open_journals(tmp_path, remembered=10)[0] for _ in range(3)]
    replicas[1].add([entry(1)])
    for each in replicas:
        ids.add(each.id)
        each.close()

    opened = open_journals(tmp_path, remembered=10)

    assert [each.count() for each in opened] in ([0, 1], [1])
    assert {each.id for each in opened} <= ids
    for each in opened:
        each.close()


def test_what_a_replica_left_behind_is_written_by_another(rig: Rig, answering: Callable[..., str]) -> None:
    own, other = sorted((open_journals(rig.directory / "journal", remembered=10)[0] for _ in range(2)), key=str)
    left = make_transactions(3)
    for journal, transactions in ((own, left[:1]), (other, left[1:])):
        journal.add(
            [
                (each.trans_num.encode(), Record(rig.topic_1, encode_transaction(each), each.key, []))
                for each in transactions
            ]
        )
        journal.close()
    rig.start("producer", API_URL=answering([answer()]))

    messages = rig.read(rig.topic_1, 3, extra_s=1)

    assert {message.value() for message in messages} == {encode_transaction(each) for each in left}
    assert len(messages) == 3


def test_an_unusable_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SettingsError, match=r"JOURNAL_DIRECTORY: .*file"):
        open_journals(tmp_path / "file", remembered=10)
    (tmp_path / "producer-0.sqlite").write_text("not a database, and long enough to be looked at as one" * 100)
    with pytest.raises(SettingsError, match=r"JOURNAL_DIRECTORY: .*producer-0.sqlite: file is not a database"):
        open_journals(tmp_path, remembered=10)


def test_what_a_full_disk_does_not_take_is_an_outage(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "file", remembered=10)
    journal._file.execute("PRAGMA max_page_count = 8")  # the way SQLite itself tests it
    with pytest.raises(Outage, match=r"journal .*: database or disk is full"):
        journal.add([(str(number).encode(), Record("topic", b"x" * 5000, None, [])) for number in range(20)])
    assert journal.count() == 0
    journal.close()


def test_repeats_are_known_after_a_kill(rig: Rig, answering: Callable[..., str]) -> None:
    url = answering([answer(row(0), row(1))])
    process = rig.start("producer", API_URL=url, POLL_INTERVAL_SECONDS="0.1")
    rig.read(rig.topic_1, 2, extra_s=2)  # its journal, too, knows of them by then
    process.kill()
    process = rig.start("producer", API_URL=url, POLL_INTERVAL_SECONDS="0.1")
    until(lambda: "repeats=" in rig.log("producer").partition("left_by")[2] or process.said("repeats="), what="a poll")

    assert len(rig.read(rig.topic_1, 2, extra_s=1)) == 2


def test_without_a_broker_it_goes_on_polling_up_to_a_bound_and_delivers_once_after(
    rig: Rig, api: Callable[..., PaymentsApi]
) -> None:
    file = rig.directory / "client.properties"
    good = file.read_text()
    file.write_text("bootstrap.servers=127.0.0.1:9\n")
    source = api("--transactions", "300", "--rate", "0", "--seed", "3", "--max-rows", "50")
    process = rig.start("producer", API_URL=source.url, MAX_WAITING_RECORDS="100", **QUICK)
    until(lambda: process.said("100 records wait to be written"), what="an end of polling")

    assert source.status()["served"] == 100
    assert not process.said("the payments API")
    assert process.stop(timeout_s=20) == 0
    assert process.said("left_for_later=100")

    file.write_text(good)
    rig.start("producer", API_URL=source.url)
    messages = rig.read(rig.topic_1, 300, extra_s=1)
    assert len({message.value() for message in messages}) == len(messages) == 300
