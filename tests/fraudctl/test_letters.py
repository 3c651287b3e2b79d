"""What an operator reads of dead letters, what nobody may read, and what is said of a wrong call."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command_line import call
from conftest import make_transactions

from fraudctl.letters import CallError, Letter, LetterId, Selection, batches, parse_id, parse_since, save, totals
from fraudctl.readable import readable_header, readable_key, readable_value
from shared.privacy import passes_luhn
from shared.records import RAW_COLUMNS, encode_transaction

CARD = 4497913965512794052  # fails the Luhn test, as many of the API's do
BORN = "1955-11-07"
ODD = {"cc_num": "4497/9139/6551/2794/052", "dob": "7 November 1955"}
NOW_MS = 1_767_225_600_000  # 2026-01-01T00:00Z
TOPICS = ("topic_1", "topic_2")


def letter(offset: int, value: bytes | None = b"{}", *, reason: str = "not JSON", at_ms: int = NOW_MS) -> Letter:
    refused: list[tuple[str, str | bytes | None]] = [("dlq-reason", reason.encode()), ("dlq-topic", b"topic_1")]
    return Letter(LetterId("topic_1.dlq", 0, offset), value, None, refused, at_ms)


def canonical(**changes: object) -> dict[str, object]:
    transaction = msgspec.json.decode(encode_transaction(make_transactions(1)[0]))
    return {**transaction, "cc_num": CARD, "dob": BORN, **changes}


def split(**changes: object) -> dict[str, list[Any]]:
    row = {**dict.fromkeys(RAW_COLUMNS, 1), "cc_num": CARD, "dob": BORN, "current_time": NOW_MS, **changes}
    return {"columns": list(row), "index": [0], "data": [list(row.values())]}


def without_a_cell(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**table, "data": [row[1:] for row in table["data"]]}


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(json.dumps(canonical()), id="canonical"),
        pytest.param(json.dumps(canonical(cc_num=str(CARD))), id="card as text"),
        pytest.param(json.dumps(canonical(cc_num="4497 9139 6551 2794 052")), id="card with blanks"),
        pytest.param(json.dumps(canonical(cc_num=float(CARD))), id="card as a float"),
        pytest.param(json.dumps(canonical(cc_num=[CARD], dob={"born": BORN})), id="card and birth date inside"),
        pytest.param(json.dumps(canonical(amt="x"))[:-9], id="cut off"),
        pytest.param(f'{{"dob": "{BORN[:8]}', id="cut off in the birth date"),
        pytest.param(json.dumps(split()), id="split form"),
        pytest.param(json.dumps(canonical(**ODD)), id="unusual forms"),
        pytest.param(json.dumps(canonical(**ODD))[:-2], id="unusual forms cut off"),
        pytest.param(json.dumps(json.dumps(canonical(**ODD)))[:-2], id="unusual forms in a string cut off"),
        pytest.param(json.dumps(json.dumps(split())), id="split form in a string"),
        pytest.param(json.dumps(split())[:-2], id="split form cut off"),
        pytest.param(json.dumps(json.dumps(split()))[:-2], id="split form in a string cut off"),
        pytest.param(json.dumps(without_a_cell(split())), id="split form with a cell too few"),
        pytest.param(json.dumps(split()).replace("cc_num", "card").replace("dob", "born"), id="other column names"),
        pytest.param(json.dumps({"card": float(CARD), "born": BORN}), id="a float under another name"),
        pytest.param(json.dumps({"note": json.dumps(canonical())}), id="JSON inside"),
        pytest.param(json.dumps({str(CARD): BORN}), id="card as a name"),
        pytest.param(f"cc_num: {CARD}, dob: {BORN}", id="no JSON"),
        pytest.param(f"{CARD};{BORN}", id="no names"),
        pytest.param("[" * 900 + f'"{CARD}", "{BORN}"' + "]" * 900, id="nested deep"),
    ],
)
@pytest.mark.parametrize("garbage", [b"", b"\xff\x00"])
def test_no_value_shows_a_card_number_or_a_birth_date(value: str, garbage: bytes) -> None:
    shown = readable_value(value.encode() + garbage)

    digits = "".join(char for char in shown if char.isdigit())
    assert str(CARD)[:11] not in digits
    assert "1955" not in shown


def test_a_column_is_hidden_whatever_it_holds() -> None:
    (row,) = json.loads(readable_value(json.dumps(split(**ODD)).encode()))["data"]

    assert dict(zip(split()["columns"], row, strict=True)) == {
        **dict.fromkeys(RAW_COLUMNS, 1),
        "cc_num": "**** 4052",
        "dob": "****",
        "current_time": NOW_MS,
    }


def test_what_is_neither_stays_as_it_is() -> None:
    value = canonical(amt="12,50", trans_date_trans_time="2024-05-17 21:30:00", unix_time=NOW_MS)

    shown = json.loads(readable_value(json.dumps(value).encode()))

    assert shown == {**value, "cc_num": "**** 4052", "dob": "****"}


def test_a_card_number_in_the_wrong_field_is_hidden() -> None:
    luhn = next(number for number in range(CARD, CARD + 10) if passes_luhn(str(number)))

    shown = readable_value(json.dumps(canonical(trans_num=str(luhn), merchant=f"of {luhn}")).encode())

    assert str(luhn) not in shown
    assert f"of **** {luhn % 10_000:04d}" in shown


def test_keys_and_headers_are_readable() -> None:
    assert readable_key(str(CARD).encode()) == "**** 4052"
    assert readable_key(b"dummy") == "dummy"
    assert readable_key(None) == "none"
    assert readable_key(b"\xff\x1b[2J") == r"\xff\x1b[2J"
    assert readable_header("predicted-at-ms", str(NOW_MS).encode()) == str(NOW_MS)
    assert readable_header("card", str(CARD).encode()) == "**** 4052"
    assert readable_header("born", BORN.encode()) == "****"
    assert readable_header("probability", b"0.123456789012345") == "0.123456789012345"
    assert readable_header("nothing", None) == "none"


@pytest.mark.parametrize(
    ("text", "since_ms"),
    [
        ("90m", NOW_MS - 90 * 60_000),
        ("2h", NOW_MS - 2 * 3_600_000),
        ("3d", NOW_MS - 3 * 86_400_000),
        ("2025-12-31", NOW_MS - 86_400_000),
        ("2025-12-31T23:59:59", NOW_MS - 1000),
        ("2025-12-31 23:59:59.5Z", NOW_MS - 500),
        ("2026-01-01T02:00+02:00", NOW_MS),
    ],
)
def test_since_is_a_time_or_an_age(text: str, since_ms: int) -> None:
    assert parse_since(text, now_ms=NOW_MS) == since_ms


@pytest.mark.parametrize("text", ["", "yesterday", "2h30m", "-2h", "5", "2025-13-01"])
def test_since_is_nothing_else(text: str) -> None:
    with pytest.raises(CallError, match=r"--since: .* is neither a time"):
        parse_since(text, now_ms=NOW_MS)


def test_an_id_is_topic_partition_offset() -> None:
    assert parse_id("topic_1.dlq:3:17", TOPICS) == LetterId("topic_1.dlq", 3, 17)
    assert str(LetterId("topic_1.dlq", 3, 17)) == "topic_1.dlq:3:17"
    for wrong in ("topic_1.dlq:3", "topic_1.dlq:3:x", "other.dlq:3:17", ""):
        with pytest.raises(CallError):
            parse_id(wrong, TOPICS)


def test_a_selection_matches_what_every_filter_matches() -> None:
    found = letter(5, reason="Expected `int` - at `$.zip`", at_ms=NOW_MS)

    assert Selection(TOPICS).matches(found)
    assert Selection(TOPICS, reason="expected `INT`", since_ms=NOW_MS).matches(found)
    assert not Selection(TOPICS, reason="float").matches(found)
    assert not Selection(TOPICS, since_ms=NOW_MS + 1).matches(found)
    assert not Selection(TOPICS, ids={LetterId("topic_1.dlq", 0, 6)}).matches(found)


def test_a_transaction_is_bounded_in_letters_and_in_bytes() -> None:
    small = [letter(offset) for offset in range(2500)]
    large = [letter(offset, b"x" * 1_000_000) for offset in range(40)]

    assert [len(batch) for batch in batches(small)] == [1000, 1000, 500]
    assert [found for batch in batches(small) for found in batch] == small
    assert [len(batch) for batch in batches(large)] == [16, 16, 8]
    assert list(batches([])) == []


def test_totals_count_by_reason_where_there_are_several() -> None:
    assert totals([]) == ["no dead letters"]
    assert totals([letter(0)]) == ["1 dead letter"]
    several = [letter(0), letter(1, reason="empty value"), letter(2)]
    assert [line.split() for line in totals(several)] == [
        ["3", "dead", "letters"],
        ["2", "not", "JSON"],
        ["1", "empty", "value"],
    ]


def test_a_saved_value_is_exact_and_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "value"

    save(letter(0, b"\xff\x00\r\n"), path)

    assert path.read_bytes() == b"\xff\x00\r\n"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        save(letter(0, b"other"), path)
    assert path.read_bytes() == b"\xff\x00\r\n"
    with pytest.raises(CallError, match="no value"):
        save(letter(0, None), tmp_path / "none")


WRONG_CALLS: Mapping[tuple[str, ...], str] = {
    ("list", "--since", "yesterday"): "--since: 'yesterday' is neither a time",
    ("list", "--topic", "topic_3"): "there is no topic 'topic_3'. Choose from: topic_1, topic_2",
    ("show", "17"): "'17' is not the ID of a dead letter. An example of an ID is topic_1.dlq:3:17.",
    ("replay", "topic_1.dlq:0:0", "--reason", "JSON"): "give either IDs or filters, not both",
    ("replay", "--value", "corrected"): "--value needs exactly one ID",
    ("replay", "topic_1.dlq:0:0", "topic_1.dlq:0:1", "--value", "corrected"): "--value needs exactly one ID",
    ("replay", "topic_1.dlq:0:0", "--value", "nowhere"): "nowhere: No such file or directory",
}


def test_a_wrong_call_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "client.properties").write_text("bootstrap.servers=127.0.0.1:9\n")
    (tmp_path / "corrected").write_text("{}")

    for arguments, line in WRONG_CALLS.items():
        done = call("dead-letters", *arguments, cwd=tmp_path, environment={"PATH": os.environ["PATH"]})
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert done.stderr.startswith(f"fraudctl: {line}"), arguments
        assert done.stderr.count("\n") == 1, done.stderr


def test_a_broker_that_is_away_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "client.properties").write_text("bootstrap.servers=127.0.0.1:9\n")

    def start(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fraudctl", "dead-letters", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            timeout=120,
            check=False,
        )

    with ThreadPoolExecutor(3) as pool:  # each waits ten seconds for the broker
        for done in pool.map(start, [("list",), ("show", "topic_1.dlq:0:0"), ("replay",)]):
            assert (done.returncode, done.stdout) == (2, ""), done.args
            assert done.stderr.startswith("fraudctl: Kafka at 127.0.0.1:9: "), done.args
            assert done.stderr.count("\n") == 1, done.stderr
