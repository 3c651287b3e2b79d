"""fraudctl tail: what lies on a topic and what comes, without what nobody may read."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka import Producer
from conftest import Rig, dead_letter_topic, make_transactions, until
from typer.testing import CliRunner, Result

from fraudctl.__main__ import app
from sandbox.embedded import EmbeddedBroker
from sandbox.raw_producer import RawProducer
from shared.dead_letters import refusal
from shared.kafka import topics
from shared.kafka.messages import NOTHING
from shared.provenance import Provenance, to_headers
from shared.records import encode_prediction, encode_transaction

pytestmark = pytest.mark.server

CARD = 4497913965512794052


@pytest.fixture(autouse=True)
def settings(rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in rig.environment.items():
        monkeypatch.setenv(name, value)


def tail(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tail", *arguments])


def test_the_last_records_are_shown_without_card_and_birth_date(rig: Rig) -> None:
    batch = make_transactions(20)
    for each in batch:
        each.cc_num = CARD
    producer = Producer(dict(rig.properties))
    for number, each in enumerate(batch):
        provenance = Provenance("fraud", "3", 0.25, 1_730_134_684_025, 2, number)
        value = encode_prediction(encode_transaction(each), number % 2)
        producer.produce(rig.topic_2, value, each.key, headers=to_headers(provenance), timestamp=1000 * (1 + number))
    producer.flush(20)

    shown = tail(rig.topic_2, "--count", "3")

    assert shown.exit_code == 0, shown.stderr
    for each in batch[-3:]:
        assert each.trans_num in shown.stdout
    assert batch[-4].trans_num not in shown.stdout
    assert [line for line in shown.stdout.splitlines() if "provenance" in line][-1] == (
        "  provenance: fraud version 3, probability 0.2500, predicted 2024-10-28 16:58:04 UTC,"
        " from partition 2, offset 19"
    )
    assert "**** 4052" in shown.stdout
    assert str(CARD)[:12] not in shown.stdout
    assert not any(each.dob in shown.stdout for each in batch)


def test_dead_letters_are_shown_with_their_reason(rig: Rig) -> None:
    producer = Producer(dict(rig.properties))
    letters = dead_letter_topic(rig.topic_1)
    producer.produce(letters, f'{{"cc_num": {CARD}'.encode(), headers=refusal(rig.topic_1, "not JSON", by="predictor"))
    producer.produce(letters, None, headers=NOTHING)
    producer.flush(20)

    shown = tail(letters)

    assert "  dlq-reason: not JSON\n" in shown.stdout
    assert '  value: {"cc_num": **** 4052\n' in shown.stdout
    assert shown.stdout.count("value:") == 1


@pytest.mark.parametrize("arguments", [("tail", "TOPIC", "--count", "2"), ("dead-letters", "list"), ("status",)])
def test_a_header_that_is_not_utf_8_ends_no_command(rig: Rig, arguments: tuple[str, ...]) -> None:
    letters = dead_letter_topic(rig.topic_1)
    raw = RawProducer(rig.properties)
    for topic in rig.topic_1, letters:
        for _ in range(20):  # the interpreter treats what it has called often in another way
            raw.write(topic, b"x", headers=[(b"good", b"1"), (b"\xff\xfe", b"2")])
    raw.close()
    command = [part.replace("TOPIC", rig.topic_1) for part in arguments]

    found = subprocess.run(
        [sys.executable, "-m", "fraudctl", *command],
        cwd=rig.directory,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert found.returncode in (0, 1), found.stderr  # not well: nothing else runs here
    assert "Traceback" not in found.stderr
    if arguments[0] == "dead-letters":
        assert "20 dead letters" in found.stdout


def test_a_topic_that_is_not_there_is_named() -> None:
    refused = tail("nowhere")

    assert (refused.exit_code, refused.stderr) == (2, "fraudctl: there is no topic nowhere\n")


@pytest.mark.kafka
def test_marks_of_transactions_do_not_count_as_records(apache_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIENT_PROPERTIES", apache_rig.environment["CLIENT_PROPERTIES"])
    producer = Producer({**apache_rig.properties, "transactional.id": f"test-{time.time_ns()}"})
    producer.init_transactions(20)
    for number in range(12):
        producer.begin_transaction()
        producer.produce(apache_rig.topic_1, f"value {number}".encode(), partition=0)
        producer.commit_transaction(20)

    shown = tail(apache_rig.topic_1)

    assert [line for line in shown.stdout.splitlines() if "value" in line] == [
        f"  value: value {number}" for number in range(2, 12)
    ]


@contextmanager
def following(rig: Rig, topic: str) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """`tail --follow`, with what it shows and what it says beside that."""
    out, err = rig.directory / "tail.out", rig.directory / "tail.err"
    environment = {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1", **rig.environment}
    command = [sys.executable, "-m", "fraudctl", "tail", topic, "--follow"]
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
    try:
        yield process, out, err
    finally:
        process.kill()
        process.wait()


def test_what_comes_is_shown_until_ctrl_c(rig: Rig) -> None:
    old, *new = make_transactions(3)
    rig.put_transactions([old])
    with following(rig, rig.topic_1) as (process, out, err):

        def shown() -> bool:
            rig.put_transactions(new)  # again and again: when it has begun to follow is not known
            return new[-1].trans_num in out.read_text()

        until(shown, what="a record that came")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert old.trans_num not in out.read_text()
    assert err.read_text() == ""


def test_brokers_that_go_away_are_reported_once_and_waited_for(rig: Rig, tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "own") as broker:
        rig.properties = {**rig.properties, "bootstrap.servers": broker.bootstrap}
        lines = "".join(f"{name}={value}\n" for name, value in rig.properties.items())
        Path(rig.environment["CLIENT_PROPERTIES"]).write_text(lines)
        topics.use(rig.properties, [rig.topic_1])
        with following(rig, rig.topic_1) as (process, out, err):

            def shown() -> str:
                rig.put(rig.topic_1, [b"here it is"])
                return out.read_text()

            until(shown, what="a record")
            broker.kill()
            until(err.read_text, what="a line on the brokers")
            time.sleep(3)  # in which it tries again several times
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
    (line,) = err.read_text().splitlines()
    assert line.startswith("fraudctl: Kafka at 127.0.0.1:")
