"""Transactions that nobody should write, in the ways in which they can be written."""

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any, TypeAlias

from hypothesis import strategies as st

from shared.records import FEATURES

Drawn: TypeAlias = tuple[str, float, int]
"""What a transaction is made of: a text, a number and a whole number."""

Spoilt: TypeAlias = tuple[str, str, int]
"""What a bad value is made of: the name of a field, JSON or something like it, and where the value is cut."""

BATCH = 150  # Hypothesis could not draw many more at once
TEXTS = ("merchant", "category", "first", "last", "gender", "street", "city", "state", "job")

# Texts that mean something to a program. Each is drawn as one character, which is fast and shrinks well.
_WITH_A_MEANING = [
    *(
        "=?utf-8?q?=0D=0ABcc:_x@example.org?=",
        "=?UTF-8?B?DQpCY2M6IHhAZXhhbXBsZS5vcmc=?=",
        "=?us-ascii?q?",
        "=?x*en?B?=",
    ),
    *("=?", "?=", "=0D=0A", "\r\nBcc: x@example.org", "\r\n\r\n--==", "\r\n.\r\n", "From ", "\\.", "\\N", "null"),
    *("=1+1", "@SUM(1)", "+1", "-1", '"=1+1"', ";=1", "\t=1", "\uff1d1", "fraud_", "<script>", "{{ 7 * 7 }}", "%s{0}"),
    *("'); DROP TABLE transactions; --", "\\u0000", "\\x00", '\\"', "4000000000000002", "0001-01-01", "NaN"),
    *("a" * 1000, "\U0001f355" * 200),
]
_DRAWN = {chr(0xE000 + number): text for number, text in enumerate(_WITH_A_MEANING)}
_TRANSLATION = str.maketrans(dict[str, str | int | None](_DRAWN))
_MARKS = (
    "\r\n\t\x0b\x0c\x1b\x7f\x85\xa0\xad ,;|:'\"\\/=+-@%?_<>&#a0\uff1d\uff20\ufeff\ufffe\u200b\u200e\u202e\u2028\u2029"
)
_MARKS += "\u2066\u3164\ufe0f\u0301\u0665\u00b2\U0001f600\U000e0041\U0010ffff"
_texts = st.text("".join([*_DRAWN, *_MARKS]), max_size=8).map(
    lambda text: text.translate(_TRANSLATION)[:1000]
) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)

_LARGEST_FLOAT32 = 3.4028234663852886e38
_numbers = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [1.7976931348623157e308, 1e308, 5e-324, -0.0, 1e39, _LARGEST_FLOAT32, 3.4028235677973366e38, 1e22, 0.1, 2.0**53]
)
# Everything that is whole is such a number modulo its own limit, so -1 is the largest of each.
_wholes = st.sampled_from([0, -1, 1, -2]) | st.integers(-(2**64), 2**64)

batches = st.lists(st.tuples(_texts, _numbers, _wholes), min_size=BATCH, max_size=BATCH)

numbers = st.lists(st.tuples(st.just(""), _numbers, _wholes), min_size=BATCH, max_size=BATCH)  # without texts, faster


def transactions(batch: Sequence[Drawn]) -> list[dict[str, Any]]:
    """The values of transactions that the decoder accepts, in the order of their fields. Neighbours share texts."""
    return [_values(*drawn, other=text) for drawn, (text, _, _) in zip(batch, [*batch[1:], batch[0]], strict=True)]


def _values(text: str, number: float, whole: int, *, other: str) -> dict[str, Any]:
    values = {name: (text, other)[place % 2] for place, name in enumerate(TEXTS)} | {
        "trans_date_trans_time": str(datetime(1, 1, 1) + timedelta(seconds=whole % 315_537_897_600)),
        "cc_num": 1 + whole % (10**19 - 1),
        "amt": number,
        "zip": whole % 2**31,
        "lat": -number,
        "long": number / 3,
        "city_pop": whole % 2**63,
        "dob": str(date.fromordinal(1 + whole % date.max.toordinal())),
        "trans_num": text[:200],
        "unix_time": whole % 4_102_444_800,
        "merch_lat": float(whole),
        "merch_long": number,
        "is_fraud": (None, 0, 1)[whole % 3],
    }
    return {name: values[name] for name in FEATURES}


def provenance(values: dict[str, Any]) -> dict[str, Any]:
    """A provenance for the transaction, of which some fields are unknown."""
    whole = values["city_pop"]
    known = {
        "model_name": values["merchant"][:300],
        "model_version": values["category"][-300:],
        "probability": (0.0, 1.0, 5e-324, whole / 2**63)[whole % 4],
        "predicted_at_ms": whole % 253_402_300_800_000,
        "source_partition": values["zip"],
        "source_offset": whole,
    }
    return {name: value for place, (name, value) in enumerate(known.items()) if (whole >> 8 + place) % 4}


def canonical(values: dict[str, Any]) -> bytes:
    """The transaction as JSON, in one of several ways to write it."""
    way = values["zip"]
    members = list(values.items())
    separators = (" ,\r\n", "\t: ") if way & 4 else (",", ":")
    return json.dumps(
        dict(members[::-1] if way & 1 else members), ensure_ascii=bool(way & 2), separators=separators
    ).encode()


def split(batch: Sequence[dict[str, Any]]) -> bytes:
    """The transactions as one table in split form, encoded once or twice: cards as texts, times in milliseconds."""
    rows = [
        values
        | {"cc_num": str(values["cc_num"])}
        | ({"unix_time": values["unix_time"] * 1000 + 999} if values["unix_time"] > 10**8 else {})
        for values in batch
    ]
    text: Any = {"columns": FEATURES, "index": [0], "data": [list(row.values()) for row in rows]}
    for time in range(1 + batch[-1]["zip"] % 2):
        text = json.dumps(text, ensure_ascii=bool(time))
    return str(text).encode()


def _object(members: Mapping[str, str]) -> bytes:
    """A JSON object, or something like one. The values are JSON, or something like it."""
    return "{{{}}}".format(",".join(f'"{name}":{value}' for name, value in members.items())).encode()


_IN_QUOTES = [
    *("\\ud800", "\\udfff\\ud83d", "\\u0000", "\\\\\\u0000", "\\\\u0000", "\x01", "\\x", "", "1e5", "NaN"),
    *("0001-01-01", "9999-12-31", "0000-01-01", "2023-02-29", "20240101", "2024-W01-1", "2024-1-1", "\uff12024-05-17"),
    *("0001-01-01 00:00:00", "9999-12-31 23:59:59", "2024-05-17 24:00:00", "2024-05-17T12:00:00"),
    *("2024-05-17 12:00:60", "2024-05-17 12:00:0", "\u0662024-05-17 12:00:00"),
    *(
        "4000000000000002",
        "\u0664\u0660",
        "0" * 22 + "4",
        "-4",
        " 4",
        "4_0",
        "a" * 201,
        "a" * 1001,
        "\U0001f355" * 1000,
    ),
]
_SPELLINGS = [
    *(f'"{text}"' for text in _IN_QUOTES),
    *("NaN", "Infinity", "-Infinity", "1e309", "-1e999", "1e-999", "1.", ".5", "01", "-0", "-0.0", "1E2", "1.0", "+1"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616", "9" * 19, "1" + "0" * 19, "9" * 400, "-1"),
    *("4102444799", "4102444800", "4102444799999", "4102444800000", "100000000000", "100000000001", "2147483648"),
    *("true", "false", "null", "{}", "[]", "[[[1]]]", '{"a":1}', "[" * 9000, '{"a":' * 9000, "1,", "1}", "/**/1", ""),
    *('"', "'a'", "4000000000000002.0", "4e15"),
]
_SOURCE = ("model_name", "model_version", "probability", "predicted_at_ms", "source_partition", "source_offset")
_spelt = (
    st.sampled_from(_SPELLINGS)
    | _texts.map(json.dumps)
    | st.text(st.characters(codec="utf-8"), max_size=8).map(json.dumps)
    | (_wholes | _numbers).map(json.dumps)
)
_names = st.sampled_from([*FEATURES, "current_time", "4000000000000002", "prediction", "columns", "data"])
spoilt_batches = st.lists(
    st.tuples(_names, _spelt, st.just(0) | st.integers(-700, 700)), min_size=BATCH, max_size=BATCH
)
_GOOD = _values("text", 1.5, 10**15, other="other")
_headers = (
    st.tuples(st.sampled_from(_SOURCE), st.sampled_from(_SPELLINGS)).map(
        lambda drawn: _object(dict(zip(_SOURCE, ['"fraud"', '"3"', "0.5", "1", "2", "3"], strict=True)) | dict([drawn]))
    )
    | st.none()
    | st.binary(max_size=20)
)
header_batches = st.lists(
    st.lists(st.tuples(st.sampled_from(["provenance"] * 4 + ["other"]), _headers), min_size=1, max_size=2),
    min_size=BATCH,
    max_size=BATCH,
)


def spoilt(drawn: Spoilt) -> list[bytes]:
    """A bad value as a transaction, as a table of one row in split form, and as that in a JSON string."""
    name, spelt, cut = drawn
    members = {key: json.dumps(value) for key, value in _GOOD.items()} | {name: spelt}
    table = _object({"columns": json.dumps(list(members)), "index": "[0]", "data": f"[[{','.join(members.values())}]]"})
    values = (_object(members), table, json.dumps(table.decode()).encode())
    return [value[: cut or None] for value in values]
