"""Finds the rows of a JSON table in split form, one after the other, without parsing them.

The split form is what pandas calls `orient="split"`: `{"columns": [...], "index": [...], "data": [[...], ...]}`. The
payments API encodes it once or twice. Whatever is wrong with a row, the other rows are found, and millions of worthless
rows take little more memory than their text.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_SPACE = re.compile(rb"[ \t\n\r]*+")
_STRING_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
_STRING = re.compile(_STRING_TEXT, re.DOTALL)
_FLAT_TEXT = rb'\[(?:[^"\[\]{}]++|' + _STRING_TEXT + rb")*+\]"
_FLAT = re.compile(_FLAT_TEXT, re.DOTALL)
_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING_TEXT + rb"|" + _FLAT_TEXT + rb")*+([\[\]{}])", re.DOTALL)
_SCALAR = re.compile(rb'[^"\[\]{},\s]++')
# Values that cannot be rows, because they are no lists, or because their lists are too short for a transaction.
_WORTHLESS = re.compile(rb'(?:\[[^"\[\]{}]{0,40}+\][ \t\n\r,]*+){1,10000}+|[^"\[\]{}]++')
_ESCAPES = re.compile(
    rb"\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL
)
_TOKENS = re.compile(
    rb"(?:[^\\]{1,4096}+|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.){1,4096}+",
    re.DOTALL,
)
_CONTROLS = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}


class Table(NamedTuple):
    """A table whose rows are still text."""

    columns: bytes  # JSON
    text: bytes
    data: int  # where the rows begin in `text`


class Piece(NamedTuple):
    """A part of a table's data: a row, or something else, as JSON text."""

    text: bytes
    values: int = 1  # number of values in `text`; if there are several, none of them is a row


def find(body: bytes) -> Table | None:
    """Find the table in a text that should be JSON. Returns None if it is not an object with `columns` and `data`."""
    text = body
    at = _after_space(text, 0)
    if text[at : at + 1] == b'"':
        text = _decoded(text, at)
        at = _after_space(text, 0)
    columns, data = _members(text, at)
    return Table(columns, text, data + 1) if columns and text[data : data + 1] == b"[" else None


def pieces(table: Table) -> Iterator[Piece]:
    """Yield the table's rows, and whatever else is among them, in order.

    If the text ends too early, or is no JSON from some point on, the rest is one piece.
    """
    text, at = table.text, table.data
    while at < len(text):
        first = text[at : at + 1]
        if first in b" \t\n\r,":
            at += 1
            continue
        if first == b"]":
            break
        if worthless := _WORTHLESS.match(text, at):
            end = worthless.end()
            values = worthless[0].count(b"[") or 1 + worthless[0].rstrip(b" \t\n\r,").count(b",")
            yield Piece(worthless[0], values)
        else:
            end = _end(text, at)
            yield Piece(text[at:end])
        at = end


def _members(text: bytes, at: int) -> tuple[bytes, int]:
    """Return the value of an object's member `columns`, and where the value of its member `data` begins."""
    columns, data = b"", len(text)
    if text[at : at + 1] != b"{":
        return columns, data
    at += 1
    while name := _STRING.match(text, _skip(text, at, b",")):
        begin = _skip(text, name.end(), b":")
        if name[0] == b'"data"':
            data = begin
            if columns:  # nothing else is needed, and the end of the data is far away
                break
        at = _end(text, begin)
        if name[0] == b'"columns"':
            columns = text[begin:at]
    return columns, data


def _skip(text: bytes, at: int, mark: bytes) -> int:
    """Skip white space, and at most one `mark` in it."""
    at = _after_space(text, at)
    return _after_space(text, at + 1) if text[at : at + 1] == mark else at


def _after_space(text: bytes, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _end(text: bytes, at: int) -> int:
    """Return where the JSON value that begins here ends, or the end of the text if the value never ends."""
    if flat := _FLAT.match(text, at) or _STRING.match(text, at) or _SCALAR.match(text, at):
        return flat.end()
    depth = 0
    while bracket := _BRACKET.match(text, at):
        at = bracket.end()
        depth += 1 if bracket[1] in b"[{" else -1
        if depth <= 0:
            return at
    return len(text)


def _decoded(text: bytes, at: int) -> bytes:
    """Decode the JSON string that begins here, in pieces, because a decoded text of 16 MB may take 64 MB.

    A surrogate that stands alone becomes bytes that are not UTF-8, so that only the row that contains it is refused.
    """
    string = _STRING.match(text, at)
    end = string.end() - 1 if string else len(text)
    decoded = bytearray()
    at += 1
    while at < end and (tokens := _TOKENS.match(text, at, end)):
        decoded += _ESCAPES.sub(_character, tokens[0]) if b"\\" in tokens[0] else tokens[0]
        at = tokens.end()
    return bytes(decoded)


def _character(escape: re.Match[bytes]) -> bytes:
    high, low, unit, other = escape.groups()
    if high:
        return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00).encode()
    return chr(int(unit, 16)).encode(errors="surrogatepass") if unit else _CONTROLS.get(other, other)
