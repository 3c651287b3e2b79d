"""Simulates the payments API. The simulator follows the real API's contract, and simulates faults on request.

GET /current-transactions returns a JSON string that contains JSON in pandas' split form, with one or more rows. Each
row is served once, in order. Like the real API, the simulator has no acknowledgements. Therefore, a row counts as
served as soon as its response is written.

With --confirmed, a row counts as served only when the client calls again on the same connection. If the connection ends
before that call, the row is served again. Therefore, the count includes exactly the rows that clients have received.

Without --rate and --source, each call returns one new transaction with the current time. Frauds are then as frequent at
noon as at night.
"""

import argparse
import csv
import json
import random
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from heapq import heappop, heappush
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from pathlib import Path
from threading import Lock, Thread
from typing import Annotated, Any, Literal, Protocol, get_args

import msgspec
import requests

from sandbox.generator import FRAUD_HOURS, FRAUD_RATE, ROUND_THE_CLOCK, transactions
from sandbox.hostile_answers import MARK, ODD_ROWS, REFUSED, TEXTS, Answer, encoded_again, failures, table
from sandbox.processes import Process, StandInError, free_port, port_open, python
from shared.records import FEATURES, RAW_COLUMNS, TIME_FORMAT

PATH = "/current-transactions"
Fault = Literal["5xx", "429", "timeout", "html", "broken-json", "repeats"]
Hostility = Literal["hostile-failure", "hostile-body", "hostile-row", "hostile-texts"]
FAULTS: tuple[str, ...] = get_args(Fault)
HOSTILITIES: tuple[str, ...] = get_args(Hostility)
_DEFAULT_START = datetime(2024, 5, 17, 20, 0, tzinfo=UTC)  # shortly before the hours with the most frauds
_LONGEST_WAIT_S = 0.25
_HANG_S = 3.0
_INTEGERS = {"cc_num", "zip", "city_pop"}
_NUMBERS = {"amt", "lat", "long", "merch_lat", "merch_long"}
_ROWS_REMEMBERED = 1000
_REPEATED_ROWS = 5

Row = Sequence[Any]
Numbered = tuple[int, Row]  # rows are numbered in the order in which they are first served


class SourceError(Exception):
    """The CSV cannot be served. The message is one line that says why."""


@dataclass
class Queue:
    """The rows to serve, and a record of the rows that were served."""

    rows: Iterator[Row]
    rate: float | None  # rows due per second; 0: all at once; None: one row per call, with the time of the call
    limit: float = float("inf")  # maximum number of rows to serve in total
    numbers: Iterator[int] = field(default_factory=count)
    returned: list[Numbered] = field(default_factory=list)  # a heap
    remembered: deque[Row] = field(default_factory=lambda: deque(maxlen=_ROWS_REMEMBERED))
    identities: set[tuple[str, int]] = field(default_factory=set)
    served: int = 0
    sent: int = 0
    in_flight: int = 0
    ended: bool = False
    began: float | None = None
    lock: Lock = field(default_factory=Lock)

    def take(self, most: int) -> list[Numbered]:
        """Take up to `most` of the rows that are due. The caller must later pass each row to `done` or `put_back`.

        Rows that were put back come first. The limit does not apply to these rows, because a client may already have
        received them.
        """
        with self.lock:
            now = time.monotonic()
            if self.limit > 0:  # the clock starts with the first limit above 0, so a hold causes no burst
                self.began = self.began or now
            if self.rate is None:
                most = min(most, 1)
            again = [heappop(self.returned) for _ in range(min(most, len(self.returned)))]
            self.in_flight += len(again)
            given = self.served + self.in_flight
            due = self.limit - given
            if self.rate:
                due = min(due, 1 + (now - (self.began or now)) * self.rate - given)
            wanted = int(max(0, min(most - len(again), due)))
            fresh = list(islice(self.rows, wanted))
            self.ended = self.ended or len(fresh) < wanted
            if self.rate is None:
                fresh = [[*row[:-1], time.time_ns() // 1_000_000] for row in fresh]
            self.in_flight += len(fresh)
            return [*again, *zip(self.numbers, fresh, strict=False)]

    def done(self, rows: Sequence[Numbered], repeats: int) -> None:
        """Count a response's new rows as served. `repeats` is the number of older rows in the same response."""
        with self.lock:
            known = len(self.identities)
            self.identities.update((row[-5], row[-1] // 1000) for _, row in rows)
            self.served += len(self.identities) - known
            self.sent += len(rows) + repeats
            self.in_flight -= len(rows)
            self.remembered.extend(row for _, row in rows)

    def put_back(self, rows: Sequence[Numbered]) -> None:
        """Take back rows whose client disconnected. These rows are served again, in order, before any new rows."""
        with self.lock:
            for each in rows:
                heappush(self.returned, each)
            self.in_flight -= len(rows)

    def earlier(self, most: int) -> list[Row]:
        """Return up to `most` rows that were served before."""
        with self.lock:
            return list(islice(self.remembered, most))

    def all_served(self) -> list[tuple[str, int]]:
        """Return the identities of all rows that were served."""
        with self.lock:
            return list(self.identities)

    def hold(self, limit: float) -> None:
        """Set the maximum number of rows to serve in total, including those already served."""
        with self.lock:
            self.limit = limit

    def status(self) -> dict[str, int | bool | None]:
        """Return the state that GET /status reports.

        These entries are numbers of rows:

        - `served`: distinct rows that were served;
        - `sent`: all rows that were served, including repeated rows;
        - `repeats`: repeated rows;
        - `in_flight`: rows in responses that are not counted as served yet;
        - `put_back`: rows to be served again.
        """
        with self.lock:
            return {
                "served": self.served,
                "sent": self.sent,
                "repeats": self.sent - self.served,
                "in_flight": self.in_flight,
                "put_back": len(self.returned),
                "exhausted": self.ended and not self.in_flight and not self.returned,
                "limit": None if self.limit == float("inf") else int(self.limit),
            }


@dataclass
class Misbehaviour:
    """The faults to simulate, and the share of calls that get a fault."""

    kinds: Sequence[str] = ()
    share: float = 0.0
    dice: random.Random = field(default_factory=random.Random)

    def draw(self) -> str | None:
        """Choose a fault for this call, or None for a normal response."""
        return self.dice.choice(self.kinds) if self.kinds and self.dice.random() < self.share else None


class _Limit(msgspec.Struct):
    rows: Annotated[int, msgspec.Meta(ge=0)] | None


class _Faults(msgspec.Struct):
    kinds: list[Fault | Hostility]
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    seed: int | None = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], queue: Queue, misbehaviour: Misbehaviour, max_rows: int, *, confirmed: bool
    ) -> None:
        super().__init__(address, _Handler)
        self.queue = queue
        self.misbehaviour = misbehaviour
        self.max_rows = max_rows
        self.confirmed = confirmed
        self.refused: list[int] = []  # numbers of the marks that were served

    def mark(self) -> str:
        """Return a new mark for something that must become a dead letter."""
        self.refused.append(len(self.refused) + 1)
        return f"{MARK}{self.refused[-1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Handles one connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits 40 ms for the acknowledgement of its header
    server: _Server
    _answered: tuple[Sequence[Numbered], int] = ((), 0)  # rows and number of repeats of an uncounted response

    def finish(self) -> None:
        rows, _ = self._answered
        self.server.queue.put_back(rows)
        super().finish()

    def do_GET(self) -> None:
        self._count_answer()
        if self.path == PATH:
            self._serve()
        elif self.path == "/status":
            self._answer(json.dumps(self.server.queue.status()).encode())
        elif self.path == "/served":
            self._answer(json.dumps(self.server.queue.all_served()).encode())
        elif self.path == "/refused":
            self._answer(json.dumps(self.server.refused).encode())
        elif self.path == "/health":
            self._answer(b'"ok"')
        else:
            self._answer(b'"not found"', status=404)

    def do_POST(self) -> None:
        self._count_answer()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.path == "/limit":
                rows = msgspec.json.decode(body, type=_Limit).rows
                self.server.queue.hold(float("inf") if rows is None else rows)
            elif self.path == "/misbehave":
                order = msgspec.json.decode(body, type=_Faults)
                self.server.misbehaviour = Misbehaviour(order.kinds, order.share, random.Random(order.seed))
            else:
                self._answer(b'"not found"', status=404)
                return
        except msgspec.DecodeError as error:
            self._answer(json.dumps(str(error)).encode(), status=400)
            return
        self._answer(b'"ok"')

    def _serve(self) -> None:
        fault = self.server.misbehaviour.draw()
        if fault in _BAD_ANSWERS:
            status, text, headers = _BAD_ANSWERS[fault]
            body = (text.replace("MARK", self.server.mark()) if "MARK" in text else text).encode()
            self._answer(body, status=status, headers=headers)
            return
        dice = self.server.misbehaviour.dice
        if fault == "hostile-failure":
            self._abuse(dice.choice(list(failures(f"http://127.0.0.1:{self.server.server_port}{PATH}").values())))
            return
        if fault == "hostile-body":
            self._abuse(dice.choice(list(REFUSED.values()))(self.server.mark()))
            return
        if fault == "timeout":
            time.sleep(_HANG_S)
            self.close_connection = True
            return
        queue = self.server.queue
        deadline = time.monotonic() + _LONGEST_WAIT_S
        while not (rows := queue.take(self.server.max_rows)) and time.monotonic() < deadline:
            time.sleep(0.005)
        again = queue.earlier(_REPEATED_ROWS) if fault == "repeats" else []
        self._answered = rows, len(again)
        try:
            self._check_client()
            if fault == "hostile-row":
                self._answer(_with_odd_row([row for _, row in rows], self.server.mark(), dice))
            elif fault == "hostile-texts":
                self._answer(_encode([_with_texts(row, dice) for _, row in rows]))
            else:
                self._answer(_encode([*again, *(row for _, row in rows)]))
        except OSError:
            self.close_connection = True
        else:
            if not self.server.confirmed:
                self._count_answer()

    def _abuse(self, answer: Answer) -> None:
        """Send an answer of an adversary, and close the connection."""
        self.close_connection = True
        with suppress(OSError):
            answer(self.connection)

    def _count_answer(self) -> None:
        """Count the last response if it is not counted yet. A client that calls again has read the last response."""
        (rows, repeats), self._answered = self._answered, ((), 0)
        self.server.queue.done(rows, repeats)

    def _check_client(self) -> None:
        """Raise OSError if the client has disconnected. Writing to a disconnected client would not raise an error."""
        with suppress(BlockingIOError):
            if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise ConnectionAbortedError

    def _answer(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log no requests."""


_BAD_ANSWERS: dict[str | None, tuple[int, str, dict[str, str]]] = {
    "5xx": (503, "upstream connect error", {"Content-Type": "text/plain"}),
    "429": (429, "too many requests", {"Retry-After": "1"}),
    "html": (200, "<!DOCTYPE html><html><body>Application error MARK</body></html>", {"Content-Type": "text/html"}),
    "broken-json": (200, r'"{\"columns\":[\"MARK\",', {}),
}


def _encode(rows: Sequence[Row]) -> bytes:
    table = {"columns": RAW_COLUMNS, "index": range(len(rows)), "data": rows}
    return msgspec.json.encode(msgspec.json.encode(table, enc_hook=list).decode())


def _with_odd_row(rows: Sequence[Row], mark: str, dice: random.Random) -> bytes:
    """Encode the rows, with an odd row somewhere among them."""
    texts = [msgspec.json.encode(list(row)).decode() for row in rows]
    texts.insert(dice.randint(0, len(texts)), dice.choice(list(ODD_ROWS.values()))(mark))
    body = table(*texts)
    return encoded_again(body) if dice.random() < 0.5 else body


def _with_texts(row: Row, dice: random.Random) -> Row:
    """Return the row with odd texts. It stays a valid row, with the same identity."""
    changes = {name: dice.choice(TEXTS) for name in ("merchant", "category", "first", "city", "state", "job")}
    return [changes.get(name, value) for name, value in zip(RAW_COLUMNS, row, strict=True)]


def read_csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a training file, with the values in the order of RAW_COLUMNS.

    The file's unnamed first column is optional. `current_time` is computed from `trans_date_trans_time`, because the
    file's own `unix_time` is seven years off. Raises SourceError if the file cannot be read or has an invalid row.
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
                    raise SourceError(f"{path}: line {reader.line_num} has an invalid value") from None
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path}: not a UTF-8 file") from None
    except csv.Error as error:
        raise SourceError(f"{path}: not a CSV file: {error}") from None


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
    """The simulator as a child process on 127.0.0.1, started with the given command-line options."""

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
        """The URL to fetch transactions from."""
        return f"http://127.0.0.1:{self._port}{PATH}"

    def status(self) -> dict[str, Any]:
        """Return the fields of `Queue.status`."""
        answer: dict[str, Any] = requests.get(f"http://127.0.0.1:{self._port}/status", timeout=10).json()
        return answer

    def identities(self) -> set[tuple[str, int]]:
        """Return `trans_num` and `unix_time` (seconds) of every row served so far."""
        answer = requests.get(f"http://127.0.0.1:{self._port}/served", timeout=30).json()
        return {(trans_num, unix_time) for trans_num, unix_time in answer}

    def refused(self) -> list[int]:
        """Return the numbers of the marks served so far, each in something that must become a dead letter."""
        answer: list[int] = requests.get(f"http://127.0.0.1:{self._port}/refused", timeout=10).json()
        return answer

    def limit(self, rows: int | None) -> None:
        """Serve at most this many rows in total, until `limit` is called again. None means no limit."""
        self._order("limit", {"rows": rows})

    def misbehave(self, *kinds: str, share: float = 0.2, seed: int = 0) -> None:
        """From now on, simulate a random fault from `kinds` in this share of the calls.

        If `kinds` is empty, no faults are simulated.
        """
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
        now = options.rate is None
        rows = transactions(
            seed=seed,
            start=options.start or _DEFAULT_START,
            fraud_rate=options.fraud_rate,
            fraud_hours=ROUND_THE_CLOCK if now else FRAUD_HOURS,  # so that there are frauds at noon, too
        )
        if now:  # only rows of the current hour, because purchases depend on the hour
            rows = (row for row in rows if _hour(row[-1]) == _hour(time.time_ns() // 1_000_000))
    return islice(rows, options.transactions)


def _hour(epoch_ms: int) -> int:
    """Return the hour of the day, in UTC."""
    return epoch_ms // 3_600_000 % 24


def _utc(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def main() -> int:
    """Serve until SIGTERM. Raises SourceError if the file is unusable, and OSError if the address is in use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1.")
    parser.add_argument(
        "--port", type=int, default=8080, help="Port to listen on; 0 means any free port. Default: 8080."
    )
    parser.add_argument("--source", type=Path, help="CSV file in the training format. Default: generated rows.")
    parser.add_argument("--seed", type=int, help="Seed for the generated rows. Default: random.")
    parser.add_argument(
        "--start", type=_utc, help="Time of the first generated row; UTC, unless the time has an offset."
    )
    parser.add_argument(
        "--fraud-rate", type=float, default=FRAUD_RATE, help="Share of frauds among generated rows. Default: 0.0038."
    )
    parser.add_argument(
        "--rate",
        type=float,
        help="Rows to serve per second; 0 means no limit. If omitted: no limit with --source, else one row per call.",
    )
    parser.add_argument("--transactions", type=int, help="Number of rows to serve. Default: no limit.")
    parser.add_argument("--held", action="store_true", help="Serve no rows until POST /limit sets a limit.")
    parser.add_argument(
        "--confirmed",
        action="store_true",
        help="Count a response's rows as served only when the client calls again on the same connection. If the "
        "connection ends before that call, serve the rows again.",
    )
    parser.add_argument("--max-rows", type=int, default=500, help="Maximum number of rows per response. Default: 500.")
    parser.add_argument(
        "--misbehave", default="", help=f"Faults to simulate, comma-separated: {', '.join(FAULTS + HOSTILITIES)}."
    )
    parser.add_argument(
        "--misbehave-share", type=float, default=0.2, help="Share of calls with a simulated fault. Default: 0.2."
    )
    parser.add_argument("--misbehave-seed", type=int, default=0, help="Seed for the faults. Default: 0.")
    options = parser.parse_args()
    kinds = [kind for kind in options.misbehave.split(",") if kind]
    if unknown := set(kinds) - set(FAULTS + HOSTILITIES):
        parser.error(f"--misbehave: unknown fault: {', '.join(sorted(unknown))}")
    if options.source:
        check_source(options.source, rows=options.transactions)
    rate = 0.0 if options.source and options.rate is None else options.rate
    queue = Queue(_rows(options), rate=rate, limit=0 if options.held else float("inf"))
    misbehaviour = Misbehaviour(kinds, options.misbehave_share, random.Random(options.misbehave_seed))
    address = (options.host, options.port)
    server = _Server(address, queue, misbehaviour, options.max_rows, confirmed=options.confirmed)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: Thread(target=server.shutdown).start())
    sys.stdout.write(f"listening on http://{options.host}:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever(poll_interval=0.1)
    server.server_close()
    return 0


def check_source(path: Path, *, rows: int | None = None) -> None:
    """Check that the file, or its first `rows` rows, can be served.

    Raises SourceError if a row is invalid, or if the file has no rows.

    Reads 100,000 rows per second. Without this check, a file with an invalid row in the middle would look as if it had
    been served completely.
    """
    if not sum(1 for _ in islice(read_csv(path), rows)):
        raise SourceError(f"{path}: no rows")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SourceError, StandInError, OSError) as error:
        sys.stderr.write(f"payments API: {error}\n")
        sys.exit(2)
