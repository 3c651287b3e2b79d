"""What the services read and write, byte for byte."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Poison
from shared.privacy import mask_card
from shared.records import (
    FEATURES,
    RAW_COLUMNS,
    decode_prediction,
    encode_prediction,
    encode_transaction,
    format_time,
    read_split,
    read_topic_1,
    to_seconds,
)

RAW: dict[str, Any] = {
    "cc_num": 4497913965512794052,
    "merchant": "fraud_Berge, Kautzer and Harris",
    "category": "personal_care",
    "amt": 60.16,
    "first": "Scott",
    "last": "Edwards",
    "gender": "M",
    "street": "838 Amy Street Suite 107",
    "city": "Pembroke",
    "state": "NC",
    "zip": 28372,
    "lat": 34.6902,
    "long": -79.1834,
    "city_pop": 14783,
    "job": "Hospital doctor",
    "dob": "1955-11-07",
    "trans_num": "3cb54a489fb351f73a7db98f6c7bb1ad",
    "merch_lat": 34.38451,
    "merch_long": -78.621062,
    "is_fraud": 0,
    "current_time": 1730134684025,
}
CANONICAL: dict[str, Any] = {name: value for name, value in RAW.items() if name != "current_time"} | {
    "trans_date_trans_time": "2024-10-28 16:58:04",
    "unix_time": 1730134684,
}

texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30)
doubles = st.floats(allow_nan=False, allow_infinity=False)
canonicals = st.fixed_dictionaries(
    {
        "trans_date_trans_time": st.integers(0, 4_000_000_000).map(format_time),
        "cc_num": st.integers(1, 10**19 - 1),
        **dict.fromkeys(("merchant", "category", "first", "last", "gender", "street", "city", "state", "job"), texts),
        "amt": doubles,
        "zip": st.integers(0, 99_999),
        **dict.fromkeys(("lat", "long", "merch_lat", "merch_long"), doubles),
        "city_pop": st.integers(0, 10**9),
        "dob": st.dates().map(str),
        "trans_num": texts,
        "unix_time": st.integers(0, 4_000_000_000),
        "is_fraud": st.sampled_from([0, 1, None]),
    }
)


def split(*rows: dict[str, Any], times: int = 1) -> bytes:
    """Rows as the payments API (or an older message) holds them, encoded so many times."""
    text: Any = {
        "columns": list(rows[0]),
        "index": list(range(len(rows))),
        "data": [list(row.values()) for row in rows],
    }
    for _ in range(times):
        text = json.dumps(text)
    return str(text).encode()


def canonical(**changes: Any) -> bytes:
    return json.dumps(CANONICAL | changes).encode()


def test_the_columns_are_those_of_the_training_file() -> None:
    assert (
        ",".join(FEATURES)
        == "trans_date_trans_time,cc_num,merchant,category,amt,first,last,gender,street,city,state,zip,lat,long,"
        "city_pop,job,dob,trans_num,unix_time,merch_lat,merch_long,is_fraud"
    )
    assert list(RAW) == list(RAW_COLUMNS)


@pytest.mark.parametrize("times", [1, 2], ids=["json", "json in a json string"])
def test_an_answer_of_the_api_becomes_a_transaction(times: int) -> None:
    (transaction,) = read_split(split(RAW, times=times)).transactions

    assert json.loads(encode_transaction(transaction)) == CANONICAL
    assert list(json.loads(encode_transaction(transaction))) == list(FEATURES)
    assert transaction.key == b"4497913965512794052"


@given(canonicals)
def test_whatever_a_transaction_holds_comes_through_unchanged(values: dict[str, Any]) -> None:
    (transaction,) = read_topic_1(json.dumps(values).encode()).transactions
    prediction = decode_prediction(encode_prediction(encode_transaction(transaction), 1))

    assert {name: getattr(prediction, name) for name in FEATURES} == values
    assert prediction.prediction == 1
    assert list(json.loads(encode_prediction(encode_transaction(transaction), 0))) == [*FEATURES, "prediction"]


@given(st.integers(1, 10**19 - 1), st.booleans())
def test_card_numbers_keep_every_digit(cc_num: int, as_string: bool) -> None:
    (transaction,) = read_split(split(RAW | {"cc_num": str(cc_num) if as_string else cc_num})).transactions

    assert transaction.cc_num == cc_num
    assert f'"cc_num":{cc_num},'.encode() in encode_transaction(transaction)


@pytest.mark.parametrize(
    "older",
    [
        RAW,
        RAW | {"current_time": 1730134684},
        CANONICAL | {"unix_time": 1730134684025},
        CANONICAL,
        CANONICAL | {"trans_date_trans_time": 1730134684025},
        dict(reversed(CANONICAL.items())),
    ],
    ids=["21 raw", "21 raw, seconds", "22, milliseconds", "22, seconds", "22, date as a number", "another order"],
)
def test_older_messages_are_read(older: dict[str, Any]) -> None:
    first, second = read_topic_1(split(older, older | {"trans_num": "other"})).transactions

    assert json.loads(encode_transaction(first)) == CANONICAL
    assert second.trans_num == "other"


def test_one_bad_row_does_not_spoil_its_neighbours() -> None:
    rows = read_split(split(RAW, RAW | {"amt": "much"}, RAW | {"trans_num": "third"}))

    assert [transaction.trans_num for transaction in rows.transactions] == [RAW["trans_num"], "third"]
    (bad,) = rows.bad
    assert bad.reason.startswith("row 1: ")
    assert "$.amt" in bad.reason
    fixed = bad.value.replace(b'"much"', b"9.5")
    assert read_topic_1(fixed).transactions[0].amt == 9.5


def test_milliseconds_are_made_seconds() -> None:
    (transaction,) = read_topic_1(canonical(unix_time=1730134684025)).transactions

    assert transaction.unix_time == 1730134684
    assert to_seconds(1371816865) == 1371816865


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty"),
        (b"", "empty"),
        (b"temperature: 21", "malformed"),
        (b"<html>502 Bad Gateway</html>", "malformed"),
        (b'{"degrees_in_celsion": 21}', "degrees_in_celsion"),
        (b'"just a string"', "Expected `object`"),
        (b"[" * 100_000, "Expected `object`"),
        (b'{"merchant":"\xff"}', "can't decode"),
        (json.dumps({k: v for k, v in CANONICAL.items() if k != "merchant"}).encode(), "merchant"),
        (canonical(extra=1), "extra"),
        (canonical(amt="60.16"), "$.amt"),
        (canonical(cc_num=4.497913965512794e18), "$.cc_num"),
        (canonical(cc_num=10**19), "$.cc_num"),
        (canonical(cc_num=0), "$.cc_num"),
        (canonical(is_fraud=2), "$.is_fraud"),
        (canonical(zip=None), "$.zip"),
        (canonical(unix_time=-1), "$.unix_time"),
        (canonical(trans_date_trans_time="yesterday"), "$.trans_date_trans_time"),
        (canonical(trans_date_trans_time="infinity           "), "$.trans_date_trans_time"),
        (canonical(dob="epoch"), "$.dob"),
        (canonical(dob="1955-13-45"), "$.dob"),
        (canonical(trans_date_trans_time="2023-02-29 12:00:00"), "$.trans_date_trans_time"),
        (canonical(trans_date_trans_time="2024-02-29 24:00:00"), "$.trans_date_trans_time"),
        (canonical(merchant="cut \0 off"), "NUL"),
        (canonical(merchant="back\\\0slash"), "NUL"),
        (canonical(amt=float("nan")), "malformed"),
        (b'{"columns":["a"],"data":[[1]]}', "missing ['amt'"),
        (b'{"columns":null,"data":[]}', "split form"),
    ],
)
def test_rubbish_is_refused_with_a_reason(value: bytes | None, reason: str) -> None:
    with pytest.raises(Poison, match=r".+") as refusal:
        read_topic_1(value)

    assert reason in str(refusal.value)


@pytest.mark.parametrize("body", [b"", b"<html></html>", b"null", b"[]", b'"nested \\"', b"[" * 100_000, b"\xff\xfe"])
def test_an_answer_that_is_no_table_is_refused(body: bytes) -> None:
    with pytest.raises(Poison):
        read_split(body)


@given(st.binary(max_size=200))
def test_no_bytes_bring_the_reader_down(value: bytes) -> None:
    for read in (read_topic_1, read_split, decode_prediction):
        with pytest.raises(Poison):
            read(value)


@given(st.dictionaries(st.sampled_from(FEATURES), st.none() | st.booleans() | doubles | texts, min_size=1))
def test_wrong_types_are_refused_or_read_but_never_more(changes: dict[str, Any]) -> None:
    for value in (canonical(**changes), split(CANONICAL | changes)):
        try:
            read_topic_1(value)
        except Poison as poison:
            assert str(CANONICAL["cc_num"]) not in str(poison)


def test_a_nul_that_is_only_spelled_is_text() -> None:
    (transaction,) = read_topic_1(canonical(merchant="spelled \\u0000 out")).transactions

    assert transaction.merchant == "spelled \\u0000 out"


def test_people_see_four_digits() -> None:
    assert mask_card(4497913965512794052) == "**** 4052"
    assert mask_card(630423337007) == "**** 7007"
