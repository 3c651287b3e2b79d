"""Reads and writes the records of topic_1 (N+1 fields) and topic_2 (N+2 fields).

The canonical value of a record is a flat JSON object. The payments API and older topic_1 messages use the "split" form
of pandas (`{"columns": ..., "index": ..., "data": ...}`), often as a JSON string inside JSON. `read_split` and
`read_topic_1` turn split form into transactions.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from shared import split_form
from shared.errors import Poison
from shared.privacy import without_digits
from shared.text import BACKSLASH

Int32 = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]

Text = Annotated[str, Meta(max_length=1000)]
Key = Annotated[str, Meta(max_length=200)]  # short enough for a database index

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000").search  # finds an escaped NUL, but no escaped backslash before u0000
MAX_CARD_DIGITS = 19
_END_OF_CARDS = 10**MAX_CARD_DIGITS
# A larger epoch must be in milliseconds, because in seconds it would be later than the year 5138. A smaller epoch must
# be in seconds, because in milliseconds it would be earlier than March 1973.
_LARGEST_SECONDS = 10**11
_END_OF_TIMES = 4_102_444_800  # the year 2100
_LARGEST_TABLE = 16 * 1024 * 1024  # bytes of a topic_1 value in split form
_SLICE = 1000  # rows
_SLICE_BYTES = 1024 * 1024
_LARGEST_COPIED = 32 * 1024  # bytes; a larger value of a transaction is mostly white space


class Transaction(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One card payment, as written to topic_1: N features and the source's label."""

    trans_date_trans_time: Annotated[str, Meta(max_length=19)]  # YYYY-MM-DD HH:MM:SS, UTC
    cc_num: Annotated[int, Meta(ge=1)]  # up to 19 digits, which may be too many for float64 and int64
    merchant: Text
    category: Text
    amt: float
    first: Text
    last: Text
    gender: Text
    street: Text
    city: Text
    state: Text
    zip: Int32
    lat: float
    long: float
    city_pop: Int64
    job: Text
    dob: Annotated[str, Meta(max_length=10)]  # YYYY-MM-DD
    trans_num: Key
    unix_time: Int64  # seconds, UTC
    merch_lat: float
    merch_long: float
    is_fraud: Literal[0, 1] | None

    @property
    def identity(self) -> tuple[str, int]:
        """What identifies the transaction. A `trans_num` alone is not unique, because the source may reuse it later."""
        return self.trans_num, self.unix_time

    @property
    def key(self) -> bytes:
        """The record key. It is the card number, so all transactions of a card share a partition and stay in order."""
        return str(self.cc_num).encode()


class Prediction(Transaction, gc=False):
    """One card payment, as written to topic_2: the unchanged transaction and the prediction."""

    prediction: Literal[0, 1]


# A made-up transaction. Every model must be able to score it, and every alarm template must be able to show it.
REFERENCE = Transaction(
    trans_date_trans_time="2024-05-17 13:45:12",
    cc_num=4000000000000002,
    merchant="fraud_Kirlin and Sons",
    category="grocery_pos",
    amt=104.32,
    first="Ada",
    last="Miller",
    gender="F",
    street="12 Example Street",
    city="Springfield",
    state="NC",
    zip=28372,
    lat=34.69,
    long=-79.18,
    city_pop=14783,
    job="Engineer",
    dob="1975-04-02",
    trans_num="00000000000000000000000000000000",
    unix_time=1715953512,
    merch_lat=34.38,
    merch_long=-78.62,
    is_fraud=0,
)

FEATURES: tuple[str, ...] = Transaction.__struct_fields__
RAW_COLUMNS: tuple[str, ...] = (
    *(name for name in FEATURES if name not in ("trans_date_trans_time", "unix_time", "is_fraud")),
    "is_fraud",
    "current_time",
)

_T = TypeVar("_T", bound=Transaction)
_encode = msgspec.json.Encoder().encode
_decode_transaction = msgspec.json.Decoder(Transaction).decode
_decode_any = msgspec.json.Decoder().decode
_decode_prediction = msgspec.json.Decoder(Prediction).decode


class NotJson(Poison):
    """The value is not JSON. Usually, such a value is an error page."""


class BadRow(NamedTuple):
    """Something among the rows that could not be read, as JSON text, and the reason."""

    reason: str
    columns: bytes
    text: bytes
    rows: int = 1  # number of values in `text`

    @property
    def value(self) -> bytes:
        """A table in split form that has nothing but this row."""
        return b'{"columns":%b,"index":[0],"data":[%b]}' % (self.columns, self.text)


class Rows(msgspec.Struct, frozen=True, gc=False):
    """The result of reading a value: its transactions, and the rows that could not be read."""

    transactions: Sequence[Transaction]
    bad: Sequence[BadRow] = ()
    canonical: bytes | None = None  # the value itself, if it is one transaction in canonical form and not too large
    in_milliseconds: int = 0  # number of transactions whose unix_time was in milliseconds


def encode_transaction(transaction: Transaction) -> bytes:
    """Encode a transaction as a topic_1 value."""
    return _encode(transaction)


def encode_prediction(value: bytes, label: int) -> bytes:
    """Make a topic_2 value: copy the bytes of a transaction's canonical `value`, and append the field `prediction`."""
    return value.rstrip()[:-1] + (b',"prediction":1}' if label else b',"prediction":0}')


def decode_prediction(value: bytes | None) -> Prediction:
    """Read a topic_2 value. Raises Poison if the value is not a valid prediction."""
    if not value:
        raise Poison("empty value")
    try:
        return _checked(_decode_prediction(_without_nul(value) if BACKSLASH in value else value))
    except ValueError as error:
        raise Poison(without_digits(str(error))) from None


def read_topic_1(value: bytes | None) -> Rows:
    """Read a topic_1 value, in canonical or in the older split form. Raises Poison for any other value."""
    if not value:
        raise Poison("empty value")
    try:
        transaction = _decode_transaction(_without_nul(value) if BACKSLASH in value else value)
    except ValueError as error:
        table = split_form.find(value) if len(value) <= _LARGEST_TABLE else None
        if table:
            return _together(_slices(table))
        raise Poison(without_digits(str(error))) from None
    if transaction.unix_time > _LARGEST_SECONDS:
        transaction.unix_time = to_seconds(transaction.unix_time)
        return Rows((_checked(transaction),), in_milliseconds=1)
    return Rows((_checked(transaction),), (), value if len(value) <= _LARGEST_COPIED else None)


def read_split(body: bytes) -> Rows:
    """Read a response of the payments API: transactions in split form, JSON-encoded once or twice.

    Raises Poison for any other response.
    """
    return _together(read_slices(body))


def read_slices(body: bytes) -> Iterator[Rows]:
    """Read a response of the payments API, at most a thousand rows or about a megabyte at a time.

    Whatever is wrong with a row, the other rows are read. Raises NotJson if the response is no JSON, and Poison if it
    is no table of transactions.
    """
    table = split_form.find(body)
    if table is None:
        try:
            msgspec.json.decode(body, type=msgspec.Raw)
        except (ValueError, RecursionError) as error:
            raise NotJson(without_digits(f"not JSON: {error}")) from None
        raise Poison("not in split form: expected an object with columns, and data that is a list of rows")
    return _slices(table)


def to_seconds(epoch: int) -> int:
    """Convert an epoch in milliseconds to seconds. An epoch in seconds is returned unchanged."""
    return epoch // 1000 if epoch > _LARGEST_SECONDS else epoch


def format_time(unix_time: int) -> str:
    """Format epoch seconds as `YYYY-MM-DD HH:MM:SS` in UTC.

    Raises ValueError or OverflowError if the time is out of range.
    """
    return time.strftime(TIME_FORMAT, time.gmtime(unix_time))


def _checked(transaction: _T) -> _T:
    """Return the transaction if it passes the checks that msgspec's types cannot make. Otherwise, raises Poison.

    Times are checked here because PostgreSQL would also accept words such as `yesterday` as times.
    """
    moment = transaction.trans_date_trans_time
    if transaction.unix_time >= _END_OF_TIMES:
        raise Poison("Expected a time before 2100 - at `$.unix_time`")
    if transaction.cc_num >= _END_OF_CARDS:
        raise Poison(f"Expected `int` of at most {MAX_CARD_DIGITS} digits - at `$.cc_num`")
    try:
        datetime.fromisoformat(moment)
    except ValueError:
        moment = ""
    if moment[4::3] != "-- ::":  # check the separators, because ISO 8601 also allows other forms
        raise Poison("Expected YYYY-MM-DD HH:MM:SS - at `$.trans_date_trans_time`")
    if not _is_date(transaction.dob):
        raise Poison("Expected YYYY-MM-DD - at `$.dob`")
    return transaction


@lru_cache(100_000)  # many transactions share a date of birth
def _is_date(text: str) -> bool:
    """Whether the text is an existing date, written as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text) is not None and text[4::3] == "--"
    except ValueError:
        return False


def _without_nul(text: bytes) -> bytes:
    """Return the JSON unchanged. Raises Poison if a string in it contains NUL, which PostgreSQL cannot store."""
    if b"\\" in text and _NUL(text):
        raise Poison("a string contains NUL")
    return text


def _slices(table: split_form.Table) -> Iterator[Rows]:
    columns = _columns(table.columns)
    in_milliseconds = None if "current_time" in columns else columns.index("unix_time")
    number = 0
    for some in _groups(split_form.pieces(table)):
        transactions, bad, milliseconds = [], [], 0
        for piece in some:
            number += piece.values
            try:
                row = _row(piece, columns)
                transactions.append(_from_row(dict(zip(columns, row, strict=True))))
            except Poison as error:
                bad.append(BadRow(f"row {number - 1}: {error}", table.columns, piece.text, piece.values))
            else:
                milliseconds += in_milliseconds is not None and row[in_milliseconds] > _LARGEST_SECONDS
        yield Rows(transactions, bad, in_milliseconds=milliseconds)


def _groups(pieces: Iterable[split_form.Piece]) -> Iterator[list[split_form.Piece]]:
    group: list[split_form.Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if len(group) == _SLICE or size >= _SLICE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _row(piece: split_form.Piece, columns: Sequence[str]) -> list[Any]:
    try:
        row = _decode_any(_without_nul(piece.text)) if piece.values == 1 else None
    except (ValueError, RecursionError) as error:
        raise Poison(without_digits(f"not JSON: {error}")) from None
    if not isinstance(row, list) or len(row) != len(columns):
        raise Poison(f"expected a list of {len(columns)} values")
    return row


def _together(slices: Iterable[Rows]) -> Rows:
    all_rows = list(slices)
    return Rows(
        [each for rows in all_rows for each in rows.transactions],
        [each for rows in all_rows for each in rows.bad],
        in_milliseconds=sum(rows.in_milliseconds for rows in all_rows),
    )


def _columns(text: bytes) -> list[str]:
    """Return the names of a table's columns. Raises Poison if they are not those of transactions."""
    try:
        names = msgspec.json.decode(text, type=list[str])
    except (ValueError, RecursionError):
        raise Poison("not in split form: columns is not a list of names") from None
    expected = RAW_COLUMNS if "current_time" in names else FEATURES
    missing = sorted(set(expected) - set(names))
    unexpected = sorted(set(names) - set(expected))
    if missing or unexpected or len(names) != len(expected):
        raise Poison(without_digits(f"wrong columns: missing {missing}, unexpected {unexpected}"))
    return names


def _from_row(row: Mapping[str, Any]) -> Transaction:
    values = dict(row)
    epoch = values.pop("current_time", values.get("unix_time"))
    if type(epoch) is not int:
        raise Poison("Expected `int` - at `$.current_time` or `$.unix_time`")
    values["unix_time"] = to_seconds(epoch)
    try:
        if not _is_time(values.get("trans_date_trans_time")):
            values["trans_date_trans_time"] = format_time(values["unix_time"])
        card = values["cc_num"]
        if isinstance(card, str) and card.isascii() and card.isdigit():
            values["cc_num"] = int(card)
        return _checked(msgspec.convert(values, Transaction))
    except (msgspec.ValidationError, ValueError, OverflowError, OSError) as error:
        raise Poison(without_digits(str(error))) from None


def _is_time(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(time.strptime(text, TIME_FORMAT))
    except ValueError:
        return False
