"""A payments API that is an adversary: whatever it answers, the producer goes on, within its memory and its time."""

import gzip
import json
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import msgspec
import pytest
from conftest import Rig, make_transactions, until

from sandbox.hostile_answers import (
    MARK,
    ODD_ROWS,
    REFUSED,
    Answer,
    dripped,
    encoded_again,
    failures,
    head,
    table,
    whole,
)
from sandbox.processes import Process
from services.alerter.alarm import sample
from services.alerter.webhook import Webhook
from shared.errors import Outage, Poison
from shared.http import Client
from shared.records import RAW_COLUMNS, read_slices, read_split

pytestmark = pytest.mark.server

QUICK = {
    "POLL_INTERVAL_SECONDS": "0.1",
    "BACKOFF_INITIAL_SECONDS": "0.05",
    "BACKOFF_MAX_SECONDS": "0.1",
    "API_TIMEOUT_SECONDS": "1",
}
MOST_MB = 110  # above what an interpreter takes
INTERPRETER_MB = 9


def row(number: int, **changes: Any) -> list[Any]:
    transaction = make_transactions(number % 500 + 1, seed=number // 500)[-1]
    values = {name: getattr(transaction, name, None) for name in RAW_COLUMNS}
    known = {"trans_num": f"{number:032x}", "current_time": transaction.unix_time * 1000}
    return [*(values | known | changes).values()]


@cache
def served(number: int) -> str:
    return json.dumps(row(number))


GOOD = served(0)
LARGE = 100_000


def hostile(elsewhere: str) -> Mapping[str, Answer]:
    """What the adversary answers, by kind. `elsewhere` is the address of another server, which knows a secret."""
    rows = [GOOD.replace(f"{0:032x}", f"{LARGE + number:032x}") for number in range(60_000)]
    refused = {kind: make(f"{MARK}1") for kind, make in REFUSED.items()}
    return {
        **failures(elsewhere),
        **refused,
        "a large bomb": whole(gzip.compress(b"[" * 500_000_000, 1), Content_Encoding="gzip"),
        "large bombs in a bomb": whole(
            gzip.compress(gzip.compress(b"0," * 200_000_000)), Content_Encoding="gzip, gzip"
        ),
        "60,000 honest rows": whole(table(*rows)),
        "60 MB of empty rows": whole(table("[]," * 20_000_000 + "[]")),
        "numbers for rows": whole(table("0," * 100_000 + "0")),
        "nested rows": whole(table("[[]]," * 100_000 + "0")),
        "a number": whole(b"1"),
        "brackets alone": whole(b"[" * 1_000_000),
    }


def is_whole(request: bytes) -> bool:
    header, end, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", header, re.IGNORECASE)
    return bool(end) and len(body) >= (int(length[1]) if length else 0)


class Adversary:
    """A server on 127.0.0.1 that gives each of its answers once, and then good ones for ever."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._lock = Lock()
        self._ended = Event()
        self.next: Answer | None = None
        self.served = 0  # good answers
        self.requests: list[bytes] = []
        Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}/current-transactions"

    def close(self) -> None:
        self._ended.set()
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with closing(connection), suppress(OSError):
            while not self._ended.is_set():
                request = b""
                while not is_whole(request):
                    if not (some := connection.recv(65536)):
                        return
                    request += some
                with self._lock:
                    self.requests.append(request)
                    answer, self.next = self.next, None
                    if answer is None:
                        self.served += 1
                        number = self.served
                if answer is not None:
                    answer(connection)
                    return
                # An answer that comes too late on a busy machine is lost, so rows are served several times.
                rows = [served(each) for each in range(max(1, number - 9), number + 1)]
                connection.sendall(head(body := table(*rows)) + body)


@pytest.fixture
def adversary() -> Iterator[Adversary]:
    with closing(Adversary()) as server:
        yield server


def memory_kb(process: Process, field: str) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_whatever_the_api_answers_the_next_good_answer_is_taken(rig: Rig, adversary: Adversary) -> None:
    elsewhere = Adversary()
    rig.launch = subprocess.Popen  # with nothing imported that it does not import itself
    process = rig.start("producer", **QUICK, API_URL=adversary.url, MAX_WAITING_RECORDS="20000")  # type: ignore[arg-type]
    until(lambda: adversary.served, what="a first poll")
    most_mb = {}
    for kind, answer in hostile(elsewhere.url).items():
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
        adversary.next = answer
        until(lambda: adversary.next is None, what=f"{kind}: a poll")
        before = adversary.served
        until(lambda before=before: adversary.served >= before + 2, timeout_s=90, what=f"{kind}: good polls after it")  # type: ignore[misc]
        most_mb[kind] = memory_kb(process, "VmHWM") // 1024

    assert process.running
    assert process.stop(20) == 0
    found = rig.read(rig.topic_1, 60_000 + adversary.served - 2)  # the last answers may have come too late
    numbers = {msgspec.json.decode(each.value() or b"")["trans_num"] for each in found}
    assert {f"{number:032x}" for number in range(1, adversary.served - 1)} <= numbers
    assert not elsewhere.requests
    assert not any(b"cookie" in request.lower() for request in adversary.requests)
    assert {kind: most for kind, most in most_mb.items() if most > MOST_MB + INTERPRETER_MB} == {}
    log = rig.log("producer")
    assert "Traceback" not in log
    assert len(log.splitlines()) < 1000
    elsewhere.close()


ODD = {kind: make(f"{MARK}1") for kind, make in ODD_ROWS.items()} | {"null": "null"}


@pytest.mark.parametrize("twice", [False, True], ids=["encoded once", "encoded twice"])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_one_bad_row_costs_no_other(odd: str, twice: bool) -> None:
    body = table(json.dumps(row(0)), odd, json.dumps(row(2)))

    rows = read_split(encoded_again(body) if twice else body)

    assert [each.trans_num for each in rows.transactions] == [f"{0:032x}", f"{2:032x}"]
    (bad,) = rows.bad
    assert bad.rows == 1
    assert bad.value.startswith(b'{"columns":')


def test_rows_before_the_end_of_a_cut_answer_are_read() -> None:
    body = table(*(json.dumps(row(number)) for number in range(3)))

    for cut in body[:-40], json.dumps(body.decode())[:-40].encode():
        rows = read_split(cut)
        assert [each.trans_num for each in rows.transactions] == [f"{0:032x}", f"{1:032x}"]
        assert len(rows.bad) == 1


def test_millions_of_worthless_rows_are_few_pieces() -> None:
    for worthless, count in (("[],", 1_000_000), ("0,", 1_000_000), ("[1,2] , ", 100_000)):
        slices = list(read_slices(table(worthless * count + json.dumps(row(0)))))
        assert sum(each.rows for rows in slices for each in rows.bad) == count
        assert [each.trans_num for rows in slices for each in rows.transactions] == [f"{0:032x}"]
        assert len(slices) <= 4


def test_a_late_answer_that_has_no_length_is_not_taken_for_a_whole_one(adversary: Adversary) -> None:
    adversary.next = dripped(head() + table(json.dumps(row(0)))[:-1], b" ")

    with Client() as client, pytest.raises(Outage, match="no complete response within"):
        client.send("GET", adversary.url, timeout_s=0.5, most_bytes=10_000)


def test_a_hostile_webhook_costs_neither_memory_nor_time(adversary: Adversary) -> None:
    webhook = Webhook(url=adversary.url, secret="0123456789abcdef", timeout_s=1.0)
    elsewhere = Adversary()
    with closing(webhook), closing(elsewhere):
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind, answer in failures(elsewhere.url).items():
            adversary.next = answer
            began = time.monotonic()
            with suppress(Outage, Poison):  # a status of 2xx counts, whatever follows it
                webhook.post([sample(datetime.now(UTC))])
            assert adversary.next is None, kind
            assert time.monotonic() - began < 5, kind
            # Where the adversary has answered with 2xx, the connection may be used again, and may be closed only now.
            with suppress(Outage):
                webhook.post([sample(datetime.now(UTC))])
            served = adversary.served
            webhook.post([sample(datetime.now(UTC))])
            assert adversary.served == served + 1, kind
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 30_000
    assert not elsewhere.requests
