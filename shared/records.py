"""Reads and writes the records of topic_1 (N+1 fields) and topic_2 (N+2 fields).

The canonical value of a record is a flat JSON object. The payments API and older topic_1 messages use the "split" form
of pandas (`{"columns": ..., "index": ..., "data": ...}`), often as a JSON string inside JSON. `read_split` and
`read_topic_1` turn split form into transactions.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from shared.errors import Poison
from shared.privacy import without_digits

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
_decode_prediction = msgspec.json.Decoder(Prediction).decode


class NotJson(Poison):
    """The value is not JSON. Usually, such a value is an error page."""


class BadRow(NamedTuple):
    """A row that could not be read, and the reason. `value` is in split form and has only this row."""

    reason: str
    value: bytes


class Rows(msgspec.Struct, frozen=True, gc=False):
    """The result of reading a value: its transactions, and the rows that could not be read."""

    transactions: Sequence[Transaction]
    bad: Sequence[BadRow] = ()
    canonical: bytes | None = None  # the value itself, if it is one transaction in canonical form
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
        return _checked(_decode_prediction(_without_nul(value) if b"\\" in value else value))
    except ValueError as error:
        raise Poison(without_digits(str(error))) from None


def read_topic_1(value: bytes | None) -> Rows:
    """Read a topic_1 value, in canonical or in the older split form. Raises Poison for any other value."""
    if not value:
        raise Poison("empty value")
    try:
        transaction = _decode_transaction(_without_nul(value) if b"\\" in value else value)
    except ValueError as error:
        try:
            payload = _parse(value)
        except Poison:
            payload = None
        if isinstance(payload, dict) and "columns" in payload:
            return _rows(payload)
        raise Poison(without_digits(str(error))) from None
    if transaction.unix_time > _LARGEST_SECONDS:
        transaction.unix_time = to_seconds(transaction.unix_time)
        return Rows((_checked(transaction),), in_milliseconds=1)
    return Rows((_checked(transaction),), (), value)


def read_split(body: bytes) -> Rows:
    """Read a response of the payments API: transactions in split form, JSON-encoded once or twice.

    Raises Poison for any other response.
    """
    return _rows(_parse(body))


def to_seconds(epoch: int) -> int:
    """Convert an epoch in milliseconds to seconds. An epoch in seconds is returned unchanged."""
    return epoch // 1000 if epoch > _LARGEST_SECONDS else epoch


def format_time(unix_time: int) -> str:
    """Format epoch seconds as `YYYY-MM-DD HH:MM:SS` in UTC.

    Raises ValueError or OverflowError if the time is out of range.
    """
    return time.strftime(TIME_FORMAT, time.gmtime(unix_time))


def _parse(body: bytes) -> Any:
    try:
        payload = msgspec.json.decode(_without_nul(body))
        return msgspec.json.decode(_without_nul(payload.encode())) if isinstance(payload, str) else payload
    except (ValueError, RecursionError) as error:
        raise NotJson(f"not JSON: {error}") from None


def _checked(transaction: _T) -> _T:
    """Return the transaction if it passes the checks that msgspec's types cannot make. Otherwise, raises Poison.

    Times are checked here because PostgreSQL would also accept words such as `yesterday` as times.
    """
    moment = transaction.trans_date_trans_time
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


def _rows(payload: Any) -> Rows:
    if not isinstance(payload, dict) or not isinstance(payload.get("columns"), list):
        raise Poison("not in split form: expected an object with columns and data")
    columns, data = payload["columns"], payload.get("data")
    _check_columns(columns)
    if not isinstance(data, list):
        raise Poison("not in split form: data is not a list of rows")
    transactions, bad = [], []
    for number, row in enumerate(data):
        try:
            if not isinstance(row, list) or len(row) != len(columns):
                raise Poison(f"expected a list of {len(columns)} values")
            transactions.append(_from_row(dict(zip(columns, row, strict=True))))
        except Poison as error:
            alone = msgspec.json.encode({"columns": columns, "index": [0], "data": [row]})
            bad.append(BadRow(f"row {number}: {error}", alone))
    return Rows(transactions, bad, in_milliseconds=_in_milliseconds(columns, data))


def _in_milliseconds(columns: list[Any], data: list[Any]) -> int:
    """Count the rows whose `unix_time` is in milliseconds. Rows that have a `current_time` are not counted."""
    if "current_time" in columns:
        return 0
    at = columns.index("unix_time")
    epochs = (row[at] for row in data if isinstance(row, list) and len(row) == len(columns))
    return sum(type(epoch) is int and epoch > _LARGEST_SECONDS for epoch in epochs)


def _check_columns(columns: Iterable[object]) -> None:
    names = [str(name) for name in columns]
    expected = RAW_COLUMNS if "current_time" in names else FEATURES
    missing = sorted(set(expected) - set(names))
    unexpected = sorted(set(names) - set(expected))
    if missing or unexpected or len(names) != len(expected):
        raise Poison(without_digits(f"wrong columns: missing {missing}, unexpected {unexpected}"))


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
