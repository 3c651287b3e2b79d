"""A payments API that is an adversary: whatever it answers, the producer goes on, within its memory and its time."""

import gzip
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import msgspec
import pytest
from conftest import Rig, make_transactions, until

from sandbox.processes import Process
from shared.errors import Outage
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
SECRET = "loopback-secret"

Answer = Callable[[socket.socket], None]


def row(number: int, **changes: Any) -> list[Any]:
    transaction = make_transactions(number % 500 + 1, seed=number // 500)[-1]
    values = {name: getattr(transaction, name, None) for name in RAW_COLUMNS}
    known = {"trans_num": f"{number:032x}", "current_time": transaction.unix_time * 1000}
    return [*(values | known | changes).values()]


def table(*rows: str) -> bytes:
    """A table of rows that are JSON text."""
    return f'{{"columns":{json.dumps(RAW_COLUMNS)},"index":[],"data":[{",".join(rows)}]}}'.encode()


def head(body: bytes | None = None, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    lines += [] if body is None else [f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(body: bytes, status: str = "200 OK", **headers: str) -> Answer:
    return lambda connection: connection.sendall(head(body, status, **headers) + body)


def dripped(before: bytes, drop: bytes, every_s: float = 0.05) -> Answer:
    """Send something at once, and then a drop after another, for ever."""

    def send(connection: socket.socket) -> None:
        connection.sendall(before)
        while True:
            time.sleep(every_s)
            connection.sendall(drop)

    return send


def endless(before: bytes, piece: bytes) -> Answer:
    """Send something, and then as much as the other side takes."""

    def send(connection: socket.socket) -> None:
        connection.sendall(before)
        while True:
            connection.sendall(piece)

    return send


CHUNKED = head(Transfer_Encoding="chunked")
GOOD = json.dumps(row(0))
LARGE = 100_000


def hostile(elsewhere: str) -> Mapping[str, Answer]:
    """What the adversary answers, by kind. `elsewhere` is the address of another server, which knows a secret."""
    rows = [GOOD.replace(f"{0:032x}", f"{LARGE + number:032x}") for number in range(60_000)]
    return {
        "a dripped status line": dripped(b"", b"H"),
        "a dripped header": dripped(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
        "interim answers without end": dripped(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "a dripped body": dripped(head(b"x" * 10_000), b"["),
        "a dripped body that has no length": dripped(head(), b" "),
        "a dripped chunk extension": dripped(CHUNKED + b"5;x=", b"y"),
        "a dripped trailer": dripped(CHUNKED + b"0\r\nX: ", b"y"),
        "trailers without end": endless(CHUNKED + b"0\r\n", b"X: y\r\n" * 1000),
        "headers without end": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
        "a body without end": endless(head(), b"[" * 65536),
        "a bomb": whole(gzip.compress(b"[" * 500_000_000, 1), Content_Encoding="gzip"),
        "bombs in a bomb": whole(gzip.compress(gzip.compress(b"0," * 200_000_000)), Content_Encoding="gzip, gzip"),
        "a redirect": whole(b"", "302 Found", Location=elsewhere),
        "a redirect without end": endless(head(status="302 Found", Location=elsewhere), b"x" * 65536),
        "a redirect to nowhere": whole(b"", "302 Found", Location="http://[::1"),
        "cookies": whole(b"", "503 No", Set_Cookie="a=" + "b" * 4000),
        "60,000 honest rows": whole(table(*rows)),
        "60 MB of empty rows": whole(table("[]," * 20_000_000 + "[]")),
        "numbers for rows": whole(table("0," * 100_000 + "0")),
        "nested rows": whole(table("[[]]," * 100_000 + "0")),
        "a page": whole(b"<html>" + b"x" * 100_000 + b"</html>"),
        "nothing": whole(b""),
        "no content": whole(b"", "204 No Content"),
        "not HTTP": whole(b"", "abc"),
        "a number": whole(b"1"),
        "brackets": whole(b"[" * 1_000_000),
    }


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
                while not request.endswith(b"\r\n\r\n"):
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
                rows = [json.dumps(row(each)) for each in range(max(1, number - 4), number + 1)]
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


ODD = {
    "NUL": json.dumps(row(1, merchant="a\0b")),
    "not a number": json.dumps(row(1, amt=float("nan"))),
    "too large for a float": json.dumps(row(1, amt=1.5)).replace("1.5", "1e400"),
    "a giant number": json.dumps(row(1, zip=7)).replace(", 7,", f", {'7' * 5000},"),
    "half a character": json.dumps(row(1, merchant="M")).replace('"M"', '"\\ud800"'),
    "not UTF-8": json.dumps(row(1, merchant="\udcff"), ensure_ascii=False),
    "an object": '{"a": [1, {"b": "]"}]}',
    "a nested list": json.dumps([row(1)]),
    "a text": '"],[\\""',
    "a short row": "[1, 2]",
    "null": "null",
    "the year 5138": json.dumps(row(1, current_time=10**14)),
}


@pytest.mark.parametrize("twice", [False, True], ids=["encoded once", "encoded twice"])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_one_bad_row_costs_no_other(odd: str, twice: bool) -> None:
    text = table(json.dumps(row(0)), "ODD", json.dumps(row(2))).decode().replace("ODD", odd)
    body = json.dumps(text, ensure_ascii=False) if twice else text

    rows = read_split(body.encode(errors="surrogateescape"))

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
