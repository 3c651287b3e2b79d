"""The simulator of the payments API, as a client sees it."""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPConnection
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pytest
import requests
from conftest import SAMPLE, needs_sample, until

from sandbox.generator import ROUND_THE_CLOCK, training_frame, transactions
from sandbox.payments_api import FAULTS, HOSTILITIES, PATH, PaymentsApi
from sandbox.processes import Process, StandInError, python
from shared.records import RAW_COLUMNS, read_split

pytestmark = pytest.mark.server

Start = Callable[..., PaymentsApi]
START = datetime(2024, 5, 17, 20, 0, tzinfo=UTC)
ALL_AT_ONCE = ("--rate", "0", "--seed", "1", "--start", START.isoformat())
AT, CC_NUM, TRANS_NUM = RAW_COLUMNS.index("current_time"), 0, RAW_COLUMNS.index("trans_num")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Start]:
    started: list[PaymentsApi] = []

    def start(*options: str) -> PaymentsApi:
        started.append(PaymentsApi(*options, log=tmp_path / f"api{len(started)}.log").start())
        return started[-1]

    yield start
    for each in started:
        each.stop()


def rows(url: str, client: Any = requests) -> list[list[Any]]:
    """The rows of one call, in the session or on a connection of its own."""
    table = json.loads(client.get(url, timeout=10).json())
    assert tuple(table["columns"]) == RAW_COLUMNS
    assert len(table["index"]) == len(table["data"])
    return list(table["data"])


def rows_until_empty(url: str) -> list[list[Any]]:
    found: list[list[Any]] = []
    while more := rows(url):
        found += more
    return found


def generated(count: int) -> list[list[Any]]:
    return list(islice(transactions(seed=1, start=START), count))


def account(**changes: object) -> dict[str, object]:
    """The status after `served` rows were served once each, with these changes."""
    return {
        "sent": changes.get("served", 0),
        "repeats": 0,
        "in_flight": 0,
        "put_back": 0,
        "exhausted": False,
        "limit": None,
        **changes,
    }


def write_source(path: Path, count: int = 30, *, row_numbers: bool = True, **changes: Any) -> pd.DataFrame:
    frame = training_frame(rows=count, seed=3, start=START, fraud_rate=0.1).assign(**changes)
    frame.to_csv(path, index=row_numbers)
    return frame


def test_an_answer_is_json_within_json_in_split_form(api: Start) -> None:
    answer = requests.get(api().url, timeout=10)

    assert answer.headers["Content-Type"] == "application/json"
    assert isinstance(answer.json(), str)
    table = json.loads(answer.json())
    assert list(table) == ["columns", "index", "data"]
    assert tuple(table["columns"]) == RAW_COLUMNS
    assert len(table["data"]) == 1


def test_by_default_each_call_returns_one_payment_with_the_present_time(api: Start) -> None:
    url = api().url
    before_ms = time.time() * 1000
    (first,), (second,) = rows(url), rows(url)

    assert before_ms - 1 <= first[AT] <= second[AT] <= time.time() * 1000
    assert first[TRANS_NUM] != second[TRANS_NUM]


def test_payments_with_the_present_time_are_typical_of_the_hour(api: Start) -> None:
    source = api("--seed", "1", "--fraud-rate", "0.5")
    hour = datetime.now(UTC).hour
    served = [row for _ in range(300) for row in rows(source.url)]
    generated = transactions(seed=1, start=START, fraud_rate=0.5, fraud_hours=ROUND_THE_CLOCK)
    there = {row[TRANS_NUM]: row[AT] // 3_600_000 % 24 for row in islice(generated, 30_000)}

    assert {there[row[TRANS_NUM]] for row in served} <= {hour, datetime.now(UTC).hour}


def test_every_row_is_served_once_and_in_order_and_then_none(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--transactions", "1200", "--max-rows", "500")

    calls = [rows(source.url) for _ in range(4)]

    assert [len(call) for call in calls] == [500, 500, 200, 0]
    assert list(chain.from_iterable(calls)) == generated(1200)
    assert source.status() == account(served=1200, exhausted=True)


def test_many_clients_share_the_rows(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--transactions", "2000", "--max-rows", "7")

    with ThreadPoolExecutor(8) as pool:
        found = list(chain.from_iterable(pool.map(rows_until_empty, [source.url] * 8)))

    assert sorted(row[TRANS_NUM] for row in found) == sorted(row[TRANS_NUM] for row in generated(2000))


def test_a_rate_is_kept(api: Start) -> None:
    source = api("--rate", "40", "--seed", "1")
    began = time.monotonic()
    count = 0
    while count < 40:
        count += len(rows(source.url))

    assert count <= 1 + (time.monotonic() - began) * 40
    assert time.monotonic() - began < 10


def test_a_client_with_nothing_to_fetch_does_not_spin(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--held")
    began = time.monotonic()

    assert rows(source.url) == []
    assert 0.2 < time.monotonic() - began < 2


def test_rows_beyond_the_limit_are_not_served(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--held", "--max-rows", "7")
    assert rows_until_empty(source.url) == []

    source.limit(50)
    with ThreadPoolExecutor(4) as pool:
        found = list(chain.from_iterable(pool.map(rows_until_empty, [source.url] * 4)))
    assert len(found) == 50
    assert source.status()["limit"] == 50
    assert not source.status()["exhausted"]

    source.limit(None)
    assert rows(source.url) == generated(57)[50:]


def test_rows_become_due_at_the_rate_once_the_limit_is_lifted(api: Start) -> None:
    source = api("--rate", "20", "--seed", "1", "--held")
    for _ in range(4):
        assert rows(source.url) == []
    source.limit(None)
    began = time.monotonic()

    assert 1 <= len(rows(source.url)) <= 2 + (time.monotonic() - began) * 20


@pytest.mark.parametrize("row_numbers", [True, False])
def test_a_file_is_served_value_for_value(api: Start, tmp_path: Path, row_numbers: bool) -> None:
    written = write_source(tmp_path / "rows.csv", row_numbers=row_numbers, unix_time=1_371_816_865)

    found = rows_until_empty(api("--source", str(tmp_path / "rows.csv")).url)

    times_ms = [
        int(datetime.fromisoformat(f"{at}+00:00").timestamp()) * 1000 for at in written["trans_date_trans_time"]
    ]
    assert found == written.assign(current_time=times_ms)[list(RAW_COLUMNS)].to_numpy(dtype=object).tolist()
    assert max(len(str(row[CC_NUM])) for row in found) == 19


def test_a_file_may_lack_labels(api: Start, tmp_path: Path) -> None:
    write_source(tmp_path / "rows.csv", 2, is_fraud="")

    found = rows(api("--source", str(tmp_path / "rows.csv")).url)

    assert [row[RAW_COLUMNS.index("is_fraud")] for row in found] == [None, None]


@needs_sample
def test_the_real_sample_is_served_digit_for_digit(api: Start) -> None:
    found = rows_until_empty(api("--source", str(SAMPLE)).url)

    sample = pd.read_csv(SAMPLE, dtype=str)
    assert [str(row[CC_NUM]) for row in found] == sample["cc_num"].tolist()
    assert [row[TRANS_NUM] for row in found] == sample["trans_num"].tolist()
    assert [row[RAW_COLUMNS.index("amt")] for row in found] == sample["amt"].astype(float).tolist()


def test_a_file_that_cannot_be_served_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    write_source(tmp_path / "good.csv")
    lines = (tmp_path / "good.csv").read_text().splitlines()
    write_source(tmp_path / "unlabelled.csv", row_numbers=False)
    pd.read_csv(tmp_path / "unlabelled.csv").drop(columns="is_fraud").to_csv(tmp_path / "unlabelled.csv", index=False)
    (tmp_path / "header.csv").write_text(lines[0] + "\n")
    (tmp_path / "broken.csv").write_text("\n".join([*lines[:20], "20,rubbish", *lines[20:]]))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 100)
    wrong = {
        "unlabelled.csv": "columns missing: is_fraud",
        "nowhere.csv": "No such file",
        "header.csv": "no rows",
        "broken.csv": "line 21 has an invalid value",
        "binary.csv": "not",
    }
    processes = {}
    for name in wrong:
        command = python("sandbox.payments_api", "--port", "0", "--source", str(tmp_path / name))
        processes[name] = Process(name, command, log=tmp_path / f"{name}.log")
        processes[name].spawn()

    for name, reason in wrong.items():
        assert processes[name].wait(60) == 2
        (line,) = (tmp_path / f"{name}.log").read_text().splitlines()
        assert str(tmp_path / name) in line
        assert reason in line


def test_a_start_without_a_time_zone_is_utc(api: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    source = api("--rate", "0", "--seed", "1", "--start", "2024-05-17T20:00", "--transactions", "5")

    assert rows(source.url) == generated(5)


def test_each_fault_happens_instead_of_serving_and_costs_no_row(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--transactions", "100", "--max-rows", "10")
    found = rows(source.url)

    source.misbehave("5xx", share=1)
    assert requests.get(source.url, timeout=10).status_code == 503
    source.misbehave("429", share=1)
    answer = requests.get(source.url, timeout=10)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    source.misbehave("html", share=1)
    assert requests.get(source.url, timeout=10).text.startswith("<!DOCTYPE html>")
    source.misbehave("broken-json", share=1)
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(requests.get(source.url, timeout=10).json())
    source.misbehave("timeout", share=1)
    with pytest.raises(requests.Timeout):
        requests.get(source.url, timeout=0.3)
    source.misbehave()

    assert found + rows_until_empty(source.url) == generated(100)
    assert source.status()["sent"] == 100


def test_hostile_answers_cost_no_row_and_their_marks_are_counted(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--transactions", "100", "--max-rows", "10")
    found = rows(source.url)

    source.misbehave("hostile-row", share=1)
    answer = read_split(requests.get(source.url, timeout=10).content)
    assert (len(answer.transactions), len(answer.bad)) == (10, 1)
    source.misbehave("hostile-texts", share=1)
    odd = rows(source.url)
    assert [row[-5] for row in odd] == [row[-5] for row in generated(30)[20:]]
    assert odd != generated(30)[20:]
    source.misbehave("hostile-body", "hostile-failure", share=1)
    address = urlsplit(source.url)
    for _ in range(10):
        with socket.create_connection((address.hostname, address.port), timeout=10) as client:
            client.sendall(f"GET {PATH} HTTP/1.1\r\nHost: api\r\n\r\n".encode())
            assert client.recv(100)
    source.misbehave()

    assert found == generated(10)
    assert rows_until_empty(source.url) == generated(100)[30:]
    assert source.refused() == [*range(1, len(source.refused()) + 1)]
    assert set(HOSTILITIES).isdisjoint(FAULTS)


def test_repeats_come_on_top_of_the_rows_and_are_counted(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--transactions", "60", "--max-rows", "10")
    first = rows(source.url)
    until(lambda: source.status()["sent"] == 10, what="the end of it")
    source.misbehave("repeats", share=1)

    second = rows(source.url)

    assert second == first[:5] + generated(20)[10:]
    until(lambda: source.status()["sent"] == 25, what="the account")
    assert (source.status()["served"], source.status()["repeats"]) == (20, 5)


def test_the_same_seed_misbehaves_the_same(api: Start) -> None:
    def statuses(seed: str) -> list[int]:
        options = (*ALL_AT_ONCE, "--misbehave", "5xx,429", "--misbehave-share", "0.5", "--misbehave-seed", seed)
        url = api(*options).url
        with requests.Session() as session:
            return [session.get(url, timeout=10).status_code for _ in range(40)]

    first = statuses("1")
    assert set(first) == {200, 429, 503}
    assert first == statuses("1")
    assert first != statuses("2")


def test_rows_for_a_client_that_disconnects_are_served_again(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--transactions", "20", "--held")
    address = urlsplit(source.url)
    for _ in range(3):
        with socket.create_connection((address.hostname, address.port)) as client:
            client.sendall(f"GET {PATH} HTTP/1.1\r\nHost: api\r\n\r\n".encode())
    source.limit(None)

    found = rows_until_empty(source.url)
    until(lambda: source.status()["exhausted"], what="the end of the rows")

    assert sorted(row[TRANS_NUM] for row in found) == sorted(row[TRANS_NUM] for row in generated(20))
    assert source.status()["served"] == 20


def test_rows_are_confirmed_when_their_client_calls_again(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--confirmed", "--transactions", "25", "--max-rows", "10")
    with requests.Session() as client:
        assert rows(source.url, client) == generated(10)
        assert source.status() == account(served=0, in_flight=10)

        assert rows(source.url, client) == generated(20)[10:]
        assert source.status() == account(served=10, in_flight=10)

        assert rows(source.url, client) == generated(25)[20:]
        assert source.status() == account(served=20, in_flight=5)

        assert rows(source.url, client) == []
        assert source.status() == account(served=25, exhausted=True)


def test_any_request_on_the_connection_confirms_and_one_on_another_does_not(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--confirmed", "--max-rows", "10")
    with requests.Session() as client, requests.Session() as other:
        assert len(rows(source.url, client)) == 10
        assert len(rows(source.url, other)) == 10
        assert source.status() == account(served=0, in_flight=20)

        client.get(source.url.replace(PATH, "/health"), timeout=10)
        assert source.status() == account(served=10, in_flight=10)

        other.post(source.url.replace(PATH, "/limit"), json={"rows": 20}, timeout=10)
        assert source.status() == account(served=20, limit=20)


@pytest.mark.parametrize("reset", [False, True])
def test_unconfirmed_rows_are_served_again_first_and_in_order(api: Start, reset: bool) -> None:
    source = api(*ALL_AT_ONCE, "--confirmed", "--transactions", "45", "--max-rows", "10")
    address = urlsplit(source.url)
    clients = [HTTPConnection(str(address.hostname), address.port, timeout=10) for _ in range(3)]
    for number, client in enumerate(clients):
        client.request("GET", PATH)
        answer = json.loads(json.loads(client.getresponse().read()))
        assert answer["data"] == generated(30)[10 * number : 10 * number + 10]
    for taken, client in ((20, clients[1]), (10, clients[0]), (0, clients[2])):
        if reset:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        until(lambda taken=taken: source.status() == account(served=0, in_flight=taken, put_back=30 - taken))

    with requests.Session() as session:
        assert [row for _ in range(5) for row in rows(source.url, session)] == generated(45)
        assert rows(source.url, session) == []
    assert source.status() == account(served=45, exhausted=True)


def test_a_limit_does_not_apply_to_rows_served_before(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--confirmed", "--max-rows", "10")
    with requests.Session() as first:
        assert len(rows(source.url, first)) == 10
    until(lambda: source.status() == account(served=0, put_back=10), what="the rows put back")
    source.limit(0)

    with requests.Session() as second:
        assert rows(source.url, second) == generated(10)
        assert rows(source.url, second) == []
    assert source.status() == account(served=10, limit=0)


def test_it_is_exhausted_only_when_the_last_row_is_confirmed(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--confirmed", "--transactions", "5")
    with requests.Session() as first:
        assert len(rows(source.url, first)) == 5
        assert rows(source.url) == []
        assert not source.status()["exhausted"]
    until(lambda: source.status() == account(served=0, put_back=5), what="the rows put back")

    with requests.Session() as second:
        assert rows(source.url, second) == generated(5)
        assert not source.status()["exhausted"]
        assert rows(source.url, second) == []
        assert source.status() == account(served=5, exhausted=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_calls_again_confirms_whatever_the_answer_is(api: Start, fault: str) -> None:
    source = api(*ALL_AT_ONCE, "--confirmed", "--max-rows", "10")
    with requests.Session() as client:
        assert rows(source.url, client) == generated(10)
        source.misbehave(fault, share=1)
        with suppress(requests.Timeout):
            client.get(source.url, timeout=0.5)

        assert source.status() == account(served=10, in_flight=10 if fault == "repeats" else 0)

        source.misbehave()
        assert rows(source.url, client) == (generated(30)[20:] if fault == "repeats" else generated(20)[10:])


def test_repeats_are_counted_when_they_are_confirmed(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--confirmed", "--transactions", "20", "--max-rows", "10")
    with requests.Session() as client:
        first = rows(source.url, client)
        source.misbehave("repeats", share=1)
        assert rows(source.url, client) == first[:5] + generated(20)[10:]
    until(lambda: source.status() == account(served=10, put_back=10), what="the rows put back")
    source.misbehave()

    with requests.Session() as client:
        assert rows(source.url, client) == generated(20)[10:]
        source.misbehave("repeats", share=1)
        assert rows(source.url, client) == first[:5]
        source.misbehave()
        assert rows(source.url, client) == []
        assert source.status() == account(served=20, sent=25, repeats=5, exhausted=True)


def test_a_wrong_order_is_refused_and_changes_nothing(api: Start) -> None:
    source = api(*ALL_AT_ONCE, "--transactions", "3")
    base = source.url.removesuffix(PATH)

    for path, order in (("limit", {"rows": -1}), ("limit", {}), ("misbehave", {"kinds": ["x"], "share": 1})):
        assert requests.post(f"{base}/{path}", json=order, timeout=10).status_code == 400
    assert requests.post(f"{base}/limit", data=b"not JSON", timeout=10).status_code == 400
    assert requests.post(f"{base}/nothing", json={}, timeout=10).status_code == 404

    assert len(rows(source.url)) == 3


def test_an_unknown_fault_is_named_at_the_start(tmp_path: Path) -> None:
    assert "repeats" in FAULTS
    with pytest.raises(StandInError, match="unknown fault: fire"):
        PaymentsApi("--misbehave", "fire,5xx", log=tmp_path / "api.log").start()


def test_it_prints_its_address_is_healthy_and_ends_on_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    process = Process("api", python("sandbox.payments_api", "--port", "0"), log=log)
    with process:
        until(lambda: process.said("listening on http://127.0.0.1:"), what="the address")
        url = log.read_text().split()[-1]

        assert requests.get(f"{url}/health", timeout=10).ok

        assert process.stop() == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=2)
