"""The payments API, with the real one's contract, and its bad days on request.

GET /current-transactions answers JSON whose value is a JSON string in pandas' split form, one row or more. Each row is
served once, in order; like the real one it has no acknowledgement, so a row counts as served when its answer was
written. Without a rate, each call draws one fresh transaction that happens now.
"""

import argparse
import csv
import json
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Protocol

import msgspec
import requests

from sandbox.generator import FRAUD_RATE, transactions
from sandbox.processes import Process, StandInError, free_port, port_open, python
from shared.records import FEATURES, RAW_COLUMNS, TIME_FORMAT

PATH = "/current-transactions"
FAULTS = ("5xx", "429", "timeout", "html", "broken-json", "repeats")
_DEFAULT_START = datetime(2024, 5, 17, 20, 0, tzinfo=UTC)  # the hours of most frauds are not far
_LONGEST_WAIT_S = 0.25
_HANG_S = 3.0
_INTEGERS = {"cc_num", "zip", "city_pop"}
_NUMBERS = {"amt", "lat", "long", "merch_lat", "merch_long"}
_ROWS_REMEMBERED = 1000

Row = Sequence[Any]


class SourceError(Exception):
    """The CSV cannot be served; one line says why."""


@dataclass
class Queue:
    """The rows still to be served, and the account of those that were."""

    rows: Iterator[Row]
    rate: float | None  # rows a second that fall due; 0 all at once; None one a call, at the time of the call
    limit: float = float("inf")  # rows in all that may be served for now
    returned: deque[Row] = field(default_factory=deque)
    remembered: deque[Row] = field(default_factory=lambda: deque(maxlen=_ROWS_REMEMBERED))
    identities: set[tuple[str, int]] = field(default_factory=set)
    served: int = 0
    sent: int = 0
    exhausted: bool = False
    began: float | None = None
    lock: Lock = field(default_factory=Lock)

    def take(self, most: int) -> list[Row]:
        """The rows that are due, at most so many. They must be given to `done` or `put_back`."""
        with self.lock:
            now = time.monotonic()
            self.began = self.began or now
            due = self.limit - self.served
            if self.rate is None:
                due = min(due, 1)
            elif self.rate > 0:
                due = min(due, 1 + (now - self.began) * self.rate - self.served)
            count = int(max(0, min(most, due)))
            rows = [self.returned.popleft() for _ in range(min(count, len(self.returned)))]
            fresh = list(islice(self.rows, count - len(rows)))
            self.exhausted = self.exhausted or len(rows) + len(fresh) < count
            if self.rate is None:
                fresh = [[*row[:-1], time.time_ns() // 1_000_000] for row in fresh]
            return rows + fresh

    def done(self, rows: Sequence[Row], repeats: int) -> None:
        """Account for an answer that was written, `repeats` older rows among it."""
        with self.lock:
            known = len(self.identities)
            self.identities.update((row[-5], row[-1] // 1000) for row in rows)
            self.served += len(self.identities) - known
            self.sent += len(rows) + repeats
            self.remembered.extend(rows)

    def put_back(self, rows: Sequence[Row]) -> None:
        """The client is gone: these come first at the next call."""
        with self.lock:
            self.returned.extendleft(reversed(rows))


@dataclass
class Misbehaviour:
    """Which faults happen instead of an answer, and in what share of the calls."""

    kinds: Sequence[str] = ()
    share: float = 0.0
    dice: random.Random = field(default_factory=random.Random)

    def draw(self) -> str | None:
        """A fault for this call, or None."""
        return self.dice.choice(self.kinds) if self.kinds and self.dice.random() < self.share else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], queue: Queue, misbehaviour: Misbehaviour, max_rows: int) -> None:
        super().__init__(address, _Handler)
        self.queue = queue
        self.misbehaviour = misbehaviour
        self.max_rows = max_rows


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        if self.path == PATH:
            self._serve()
        elif self.path == "/status":
            queue = self.server.queue
            self._answer(
                json.dumps({"served": queue.served, "sent": queue.sent, "exhausted": queue.exhausted}).encode()
            )
        elif self.path == "/health":
            self._answer(b'"ok"')
        else:
            self._answer(b'"not found"', status=404)

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self.path == "/limit":
            self.server.queue.limit = float("inf") if order["rows"] is None else order["rows"]
        elif self.path == "/misbehave":
            self.server.misbehaviour = Misbehaviour(order["kinds"], order["share"], random.Random(order.get("seed")))
        self._answer(b'"ok"')

    def _serve(self) -> None:
        fault = self.server.misbehaviour.draw()
        if fault in _BAD_ANSWERS:
            status, body, headers = _BAD_ANSWERS[fault]
            self._answer(body, status=status, headers=headers)
            return
        if fault == "timeout":
            time.sleep(_HANG_S)
            self.close_connection = True
            return
        queue = self.server.queue
        deadline = time.monotonic() + _LONGEST_WAIT_S
        while not (rows := queue.take(self.server.max_rows)) and time.monotonic() < deadline:
            time.sleep(0.005)
        again = list(islice(queue.remembered, 5)) if fault == "repeats" else []
        try:
            self._answer(_encode([*again, *rows]))
        except OSError:
            queue.put_back(rows)
        else:
            queue.done(rows, len(again))

    def _answer(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


_BAD_ANSWERS: dict[str | None, tuple[int, bytes, dict[str, str]]] = {
    "5xx": (503, b"upstream connect error", {"Content-Type": "text/plain"}),
    "429": (429, b"too many requests", {"Retry-After": "1"}),
    "html": (200, b"<!DOCTYPE html><html><body>Application error</body></html>", {"Content-Type": "text/html"}),
    "broken-json": (200, b'"{\\"columns\\":[\\"cc_num\\",', {}),
}


def _encode(rows: Sequence[Row]) -> bytes:
    table = {"columns": RAW_COLUMNS, "index": range(len(rows)), "data": rows}
    return msgspec.json.encode(msgspec.json.encode(table, enc_hook=list).decode())


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a training file (with or without its unnamed first column) in RAW_COLUMNS' order.

    `current_time` is made from `trans_date_trans_time`; the file's own `unix_time` is not used. Raises SourceError.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if absent := [name for name in FEATURES if name not in (reader.fieldnames or ())]:
                raise SourceError(f"{path}: columns missing: {', '.join(absent)}")
            for row in reader:
                try:
                    yield [_value(name, row) for name in RAW_COLUMNS]
                except (ValueError, TypeError):
                    raise SourceError(f"{path}: line {reader.line_num} cannot be read") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not UTF-8 text'}") from None


def _value(name: str, row: dict[str, str]) -> Any:
    if name == "current_time":
        at = datetime.strptime(row["trans_date_trans_time"], TIME_FORMAT).replace(tzinfo=UTC)
        return int(at.timestamp()) * 1000
    text = row[name]
    if name in _INTEGERS:
        return int(text)
    if name == "is_fraud":
        return int(text) if text else None
    return float(text) if name in _NUMBERS else text


class PaymentsApi(Process):
    """The simulator as a child process on 127.0.0.1. `options` are its command line's."""

    def __init__(self, *options: str, log: Path, port: int | None = None) -> None:
        self._port = port or free_port()
        super().__init__(
            "payments API",
            python("sandbox.payments_api", "--port", str(self._port), *options),
            log=log,
            ready=lambda: port_open(self._port),
        )

    @property
    def url(self) -> str:
        """Where transactions are polled from."""
        return f"http://127.0.0.1:{self._port}{PATH}"

    def status(self) -> dict[str, Any]:
        """`served` (distinct rows), `sent` (with repeats) and `exhausted`."""
        answer: dict[str, Any] = requests.get(f"http://127.0.0.1:{self._port}/status", timeout=10).json()
        return answer

    def limit(self, rows: int | None) -> None:
        """Serve no more than so many rows in all until told otherwise; None lifts the limit."""
        self._order("limit", {"rows": rows})

    def misbehave(self, *kinds: str, share: float = 0.2, seed: int = 0) -> None:
        """From now on, have faults in this share of the calls; without kinds, none."""
        self._order("misbehave", {"kinds": kinds, "share": share, "seed": seed})

    def _order(self, path: str, order: dict[str, Any]) -> None:
        requests.post(f"http://127.0.0.1:{self._port}/{path}", json=order, timeout=10).raise_for_status()


class _Options(Protocol):
    source: Path | None
    seed: int | None
    start: datetime | None
    fraud_rate: float
    rate: float | None
    transactions: int | None


def _rows(options: _Options) -> Iterator[Row]:
    if options.source:
        rows = read_csv(options.source)
    else:
        seed = random.randrange(2**32) if options.seed is None else options.seed
        rows = iter(transactions(seed=seed, start=options.start or _DEFAULT_START, fraud_rate=options.fraud_rate))
    return islice(rows, options.transactions)


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--source", type=Path, help="a CSV in the training format; without it, rows are generated")
    parser.add_argument("--seed", type=int, help="of the generated rows; without it, others each time")
    parser.add_argument("--start", type=datetime.fromisoformat, help="when the generated rows begin")
    parser.add_argument("--fraud-rate", type=float, default=FRAUD_RATE)
    parser.add_argument("--rate", type=float, help="rows a second; 0 as fast as they are asked for")
    parser.add_argument("--transactions", type=int, help="how many rows in all")
    parser.add_argument("--held", action="store_true", help="serve nothing before a limit is set")
    parser.add_argument("--max-rows", type=int, default=500, help="rows in one answer")
    parser.add_argument("--misbehave", default="", help=f"of {','.join(FAULTS)}")
    parser.add_argument("--misbehave-share", type=float, default=0.2)
    parser.add_argument("--misbehave-seed", type=int, default=0)
    options = parser.parse_args()
    kinds = [kind for kind in options.misbehave.split(",") if kind]
    if unknown := set(kinds) - set(FAULTS):
        parser.error(f"--misbehave: no such fault: {', '.join(sorted(unknown))}")
    rate = 0.0 if options.source and options.rate is None else options.rate
    queue = Queue(_rows(options), rate=rate, limit=0 if options.held else float("inf"))
    misbehaviour = Misbehaviour(kinds, options.misbehave_share, random.Random(options.misbehave_seed))
    server = _Server((options.host, options.port), queue, misbehaviour, options.max_rows)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.1)
    return 0


def check_source(path: Path) -> None:
    """Raise SourceError if the file cannot be served, as far as its header and first row tell."""
    if next(read_csv(path), None) is None:
        raise SourceError(f"{path}: no rows")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SourceError, StandInError) as error:
        sys.stderr.write(f"payments API: {error}\n")
        sys.exit(2)
