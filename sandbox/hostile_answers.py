"""Answers of a payments API that is an adversary: endless, dripped, compressed a thousandfold, or with odd rows.

An answer is a function that writes to the client's connection. Answers with something that must become a dead letter
contain a mark, by which the dead letter is recognised.
"""

import gzip
import json
import socket
import time
from collections.abc import Callable, Mapping

from shared.records import RAW_COLUMNS, REFERENCE

Answer = Callable[[socket.socket], None]

MARK = "hostile-answer-"  # followed by a number


def table(*rows: str) -> bytes:
    """Return a table in split form. The rows are JSON text, and may contain bytes that are not UTF-8 as surrogates."""
    text = f'{{"columns":{json.dumps(RAW_COLUMNS)},"index":[],"data":[{",".join(rows)}]}}'
    return text.encode(errors="surrogateescape")


def encoded_again(body: bytes) -> bytes:
    """Return the body as a JSON string, as the payments API often does."""
    return json.dumps(body.decode(errors="surrogateescape"), ensure_ascii=False).encode(errors="surrogateescape")


def head(body: bytes | None = None, status: str = "200 OK", **headers: str) -> bytes:
    """Return the head of a response. Without a body, the response does not say how long it is."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    lines += [] if body is None else [f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(body: bytes, status: str = "200 OK", **headers: str) -> Answer:
    """Send a complete response."""
    return lambda connection: connection.sendall(head(body, status, **headers) + body)


def dripped(before: bytes, drop: bytes, every_s: float = 0.05) -> Answer:
    """Send something at once, and then one drop after another, for ever."""

    def send(connection: socket.socket) -> None:
        connection.sendall(before)
        while True:
            time.sleep(every_s)
            connection.sendall(drop)

    return send


def endless(before: bytes, piece: bytes) -> Answer:
    """Send something, and then as much as the client takes."""

    def send(connection: socket.socket) -> None:
        connection.sendall(before)
        while True:
            connection.sendall(piece)

    return send


_CHUNKED = head(Transfer_Encoding="chunked")


def failures(elsewhere: str) -> Mapping[str, Answer]:
    """Return answers that contain nothing to keep, by kind. Redirects lead to the address `elsewhere`."""
    return {
        "a dripped status line": dripped(b"", b"H"),
        "a dripped header": dripped(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
        "interim answers without end": dripped(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "a dripped body": dripped(head(b"x" * 10_000), b"["),
        "a dripped body that has no length": dripped(head(), b" "),
        "a dripped chunk extension": dripped(_CHUNKED + b"5;x=", b"y"),
        "a dripped trailer": dripped(_CHUNKED + b"0\r\nX: ", b"y"),
        "trailers without end": endless(_CHUNKED + b"0\r\n", b"X: y\r\n" * 1000),
        "headers without end": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
        "a redirect": whole(b"", "302 Found", Location=elsewhere),
        "a redirect without end": endless(head(status="302 Found", Location=elsewhere), b"x" * 65536),
        "a redirect to nowhere": whole(b"", "302 Found", Location="http://[::1"),
        "cookies": whole(b"", "503 No", Set_Cookie="a=" + "b" * 4000),
        "nothing": whole(b""),
        "no content": whole(b"", "204 No Content"),
        "not HTTP": whole(b"", "abc"),
    }


def _bomb(mark: str) -> bytes:
    return gzip.compress(f'["{mark}",'.encode() + b"[" * 50_000_000, 1)


# Answers that must become dead letters as a whole, by kind. The argument is the mark that the answer contains.
REFUSED: Mapping[str, Callable[[str], Answer]] = {
    "a page": lambda mark: whole(f"<html>{mark}".encode() + b"x" * 100_000 + b"</html>", Content_Type="text/html"),
    "a text": lambda mark: whole(json.dumps(mark).encode()),
    "brackets": lambda mark: whole(f'["{mark}",'.encode() + b"[" * 1_000_000),
    "a giant number": lambda mark: whole(f'{{"{mark}":{"7" * 100_000}}}'.encode()),
    "other columns": lambda mark: whole(f'{{"columns":["{mark}"],"index":[0],"data":[[1]]}}'.encode()),
    "a bomb": lambda mark: whole(_bomb(mark), Content_Encoding="gzip"),
    "a bomb in a bomb": lambda mark: whole(gzip.compress(_bomb(mark)), Content_Encoding="gzip, gzip"),
    "a body without end": lambda mark: endless(head() + f'["{mark}",'.encode(), b"[" * 65536),
}


def _row(mark: str, **texts: str) -> str:
    """Return a row as JSON text, in which these columns have the given JSON texts."""
    values = {name: json.dumps(getattr(REFERENCE, name, None)) for name in RAW_COLUMNS}
    own = {"trans_num": json.dumps(mark), "current_time": str(REFERENCE.unix_time * 1000)}
    return f"[{','.join((values | own | texts).values())}]"


# Rows that must become dead letters, as JSON text, by kind. The argument is the mark that the row contains.
ODD_ROWS: Mapping[str, Callable[[str], str]] = {
    "NUL": lambda mark: _row(mark, merchant=r'"a\u0000b"'),
    "not a number": lambda mark: _row(mark, amt="NaN"),
    "too large for a float": lambda mark: _row(mark, amt="1e400"),
    "a giant number": lambda mark: _row(mark, zip="7" * 5000),
    "half a character": lambda mark: _row(mark, merchant=r'"\ud800"'),
    "not UTF-8": lambda mark: _row(mark, merchant='"\udcff"'),
    "an object": lambda mark: f'{{"a": [1, {{"{mark}": "]"}}]}}',
    "a nested list": lambda mark: f"[{_row(mark)}]",
    "a text": lambda mark: f'"],[\\"{mark}"',
    "a short row": lambda mark: f'["{mark}", 2]',
    "deep": lambda mark: f'["{mark}",{"[" * 5000}{"]" * 5000}]',
    "the year 5138": lambda mark: _row(mark, current_time=str(10**14)),
}

# Texts that are valid in a transaction.
TEXTS = (
    "=?utf-8?q?x=0ABcc:_a@b=0A=0A<h1>hi</h1>?=",
    "a\r\nBcc: a@b.example\r\n\r\n<h1>hi</h1>",
    "=?utf-8?b?DQpCY2M6IGFAYg0K?= =?us-ascii?q?=0D=0ABcc:_a@b?=",
    "\u202egnitnuoc\u202c",
    "K\u200bi\u200dr\u2060l\ufeffi\u00adn",
    "=cmd|' /C calc'!A0",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f4b3\ufe0f",
    "{{ 7 * 7 }}{% raw %}<script>alert(1)</script>",
    "\\\t\\N\\.\t'\"; DROP TABLE transactions; --",
    "\x1b]0;title\x07\x1b[2J\x7f\x85\u2028",
    "x" * 1000,
    "\U0001f4b3" * 1000,
    "=?utf-8?q?" + "=41" * 330,
    "",
)
