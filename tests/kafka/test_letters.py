"""Dead letters on Apache Kafka: listed, shown, fixed, and put back exactly once, whoever else does so."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest
from command_line import call
from confluent_kafka import KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from conftest import Rig, dead_letter_topic, make_transactions, until
from typer.testing import CliRunner

from fraudctl import letters
from fraudctl.__main__ import app
from fraudctl.letters import Replayed, Selection
from sandbox.registry import Registry
from shared.dead_letters import SUFFIX, dead_letter, refusal
from shared.kafka.messages import NOTHING, Headers, Record, coordinates, headers
from shared.records import decode_prediction, encode_transaction

pytestmark = [pytest.mark.kafka, pytest.mark.xdist_group("replays")]  # a replay fences any other on the broker

MINUTE_MS = 60_000


def fraudctl(rig: Rig, *arguments: object, columns: int = 200) -> CompletedProcess[str]:
    return call("dead-letters", *arguments, cwd=rig.directory, environment={"COLUMNS": str(columns), **rig.environment})


def in_its_own_process(rig: Rig, *arguments: str) -> CompletedProcess[str]:
    command = [sys.executable, "-m", "fraudctl", "dead-letters", *arguments]
    return subprocess.run(
        command, cwd=rig.directory, env=rig.environment, capture_output=True, text=True, timeout=120, check=False
    )


def refused(
    topic: str,
    value: bytes | None,
    *,
    key: bytes | None = None,
    reason: str = "not JSON",
    by: str = "predictor",
    age_ms: int = 0,
    original: Headers | None = None,
) -> Record:
    at_ms = time.time_ns() // 1_000_000 - age_ms
    known = [header for header in refusal(topic, reason, by=by) if header[0] != "dlq-at-ms"]
    return Record(topic + SUFFIX, value, key, [*(original or []), *known, ("dlq-at-ms", str(at_ms).encode())])


def write(rig: Rig, records: Iterable[Record]) -> None:
    producer = Producer({**rig.properties, "log_level": 0})
    for record in records:
        producer.produce(record.topic, value=record.value, key=record.key, headers=record.headers)
        producer.poll(0)
    assert producer.flush(20) == 0


def identifier(message: Message) -> str:
    return ":".join(map(str, coordinates(message)))


def marks(messages: Sequence[Message]) -> list[bytes]:
    return [value for message in messages for name, value in headers(message) if name == "dlq-replayed"]


def ids_of(rig: Rig, topic: str, count: int) -> dict[bytes, str]:
    """The ids of the dead letters of a topic by their values."""
    return {message.value(): identifier(message) for message in rig.read(dead_letter_topic(topic), count)}


def selection(rig: Rig) -> Selection:
    return Selection([rig.topic_1])


def test_list_filters_and_counts(apache_rig: Rig) -> None:
    one, two = apache_rig.topic_1, apache_rig.topic_2
    write(
        apache_rig,
        [
            refused(one, b"1", reason="not JSON: card 4539578763621486", age_ms=200 * MINUTE_MS),
            refused(one, b"2", reason="empty value", age_ms=100 * MINUTE_MS),
            refused(one, b"3", reason="empty value", age_ms=MINUTE_MS),
            refused(two, b"4", reason="Expected `int` - at `$.zip`", by="db-sink", age_ms=50 * MINUTE_MS),
        ],
    )
    ids = ids_of(apache_rig, one, 3) | ids_of(apache_rig, two, 1)

    def listed(*filters: str) -> bytes:
        done = fraudctl(apache_rig, "list", *filters)
        assert done.returncode == 0, done.stderr
        found = [value for line in done.stdout.splitlines() for value, name in ids.items() if f" {name} " in line]
        assert f"{len(found) or 'no'} dead letter" in done.stdout
        return b"".join(found)

    assert listed() == b"1243"  # the oldest first
    assert listed("--topic", one) == listed("--topic", one + SUFFIX) == b"123"
    assert listed("--reason", "EMPTY") == b"23"
    assert listed("--since", "110m") == b"243"
    assert listed("--since", time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 30 * 60))) == b"3"
    assert listed("--limit", "2") == b"12"
    assert listed("--topic", two, "--reason", "empty") == b""
    everything = fraudctl(apache_rig, "list").stdout
    assert "4539578763621486" not in everything
    assert "**** 1486" in everything
    assert " db-sink " in everything
    assert "2  empty value" in everything


def test_list_keeps_its_ids_whole_on_a_narrow_terminal(apache_rig: Rig) -> None:
    write(apache_rig, [refused(apache_rig.topic_1, b"1", reason="a long reason " * 20)])
    (name,) = ids_of(apache_rig, apache_rig.topic_1, 1).values()

    assert f" {name} " in fraudctl(apache_rig, "list", columns=80).stdout


def test_a_record_that_says_nothing_is_no_letter(apache_rig: Rig) -> None:
    dead = dead_letter_topic(apache_rig.topic_1)
    write(apache_rig, [Record(dead, None, None, NOTHING), refused(apache_rig.topic_1, b"rubbish")])

    (letter,) = letters.read(apache_rig.properties, selection(apache_rig))
    assert letter.value == b"rubbish"


def test_show_hides_the_card_and_the_birth_date_and_saves_the_bytes(apache_rig: Rig) -> None:
    (transaction,) = make_transactions(1)
    value = encode_transaction(transaction)[:-1] + b',"extra":"\xff[red]\x1b[2J"}'
    write(apache_rig, [refused(apache_rig.topic_1, value, key=transaction.key, original=[("trace", b"\xfe")])])
    (name,) = ids_of(apache_rig, apache_rig.topic_1, 1).values()
    saved = apache_rig.directory / "value.json"

    shown = fraudctl(apache_rig, "show", name, "--save", saved)

    assert shown.returncode == 0, shown.stderr
    assert str(transaction.cc_num) not in shown.stdout
    assert transaction.dob not in shown.stdout
    assert f"key: **** {transaction.cc_num % 10_000:04d}" in shown.stdout
    assert transaction.trans_num in shown.stdout
    assert r"trace: \xfe" in shown.stdout
    assert "dlq-reason: not JSON" in shown.stdout
    assert "[red]" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "replayed: no" in shown.stdout
    assert saved.read_bytes() == value
    assert saved.stat().st_mode & 0o777 == 0o600
    again = fraudctl(apache_rig, "show", name, "--save", saved)
    assert again.returncode == 2
    assert again.stderr == f"fraudctl: {saved}: File exists\n"


def test_replay_puts_back_once_what_was_there(apache_rig: Rig) -> None:
    topic, began = apache_rig.topic_1, time.time()
    original: Headers = [("trace", b"\x00\xff"), ("empty", b""), ("none", None), ("trace", b"2")]
    records = [
        Record(topic, value, key, original) for value, key in ((b"\xff\x00{", b"\xfe"), (b"", b""), (None, None))
    ]
    write(apache_rig, records)
    there = apache_rig.read(topic, len(records))
    write(apache_rig, [dead_letter(message, "not JSON", group="predictor") for message in there])

    first = fraudctl(apache_rig, "replay")
    second = fraudctl(apache_rig, "replay")

    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == "replayed: 3 dead letters\n"
    assert second.stdout == "replayed: 0 dead letters; skipped: 3 already replayed\n"
    found = [
        (message.value(), message.key(), headers(message))
        for message in apache_rig.read(topic, 2 * len(records), extra_s=1)
    ]
    assert sorted(map(repr, found)) == sorted(2 * [repr((each.value, each.key, original)) for each in records])
    listed = fraudctl(apache_rig, "list").stdout
    days = {time.strftime(" %Y-%m-%d", time.gmtime(moment)) for moment in (began, time.time())}
    assert sum(map(listed.count, days)) == 2 * len(records)  # refused, replayed
    assert "3 dead letters" in listed


def test_a_refused_row_of_the_api_is_put_back_for_the_predictor(apache_rig: Rig) -> None:
    write(apache_rig, [refused(apache_rig.topic_1, b'{"columns":[]}', by="producer", reason="row 0: wrong")])

    assert fraudctl(apache_rig, "replay", "--reason", "row 0").returncode == 0

    (message,) = apache_rig.read(apache_rig.topic_1, 1)
    assert (message.value(), message.key(), headers(message)) == (b'{"columns":[]}', None, [])


def test_replay_takes_the_letters_meant_and_no_other(apache_rig: Rig) -> None:
    one, two = apache_rig.topic_1, apache_rig.topic_2
    write(apache_rig, [refused(one, b"%d" % age, age_ms=age * MINUTE_MS) for age in (10, 20, 30, 40)])
    write(apache_rig, [refused(two, b"other")])
    ids = ids_of(apache_rig, one, 4)

    by_limit = [fraudctl(apache_rig, "replay", "--topic", one, "--limit", 1).stdout for _ in range(2)]
    by_id = fraudctl(apache_rig, "replay", ids[b"10"], ids[b"40"])

    assert by_limit == ["replayed: 1 dead letter\n", "replayed: 1 dead letter; skipped: 1 already replayed\n"]
    assert by_id.stdout == "replayed: 1 dead letter; skipped: 1 already replayed\n"
    assert Counter(each.value() for each in apache_rig.read(one, 3, extra_s=1)) == Counter([b"40", b"30", b"10"])
    assert apache_rig.read(two, 0) == []


def test_two_replays_at_once_put_each_letter_back_once(apache_rig: Rig) -> None:
    values = [b"%d" % number for number in range(3500)]
    write(apache_rig, [refused(apache_rig.topic_1, value, key=value) for value in values])

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: in_its_own_process(apache_rig, "replay", "--yes"), range(3)))

    assert 0 in {each.returncode for each in done}
    for each in done:
        fenced = each.returncode == 1 and "another replay has started" in each.stderr
        assert each.returncode == 0 or fenced, each.stderr
        assert each.stderr.count("\n") <= 1
    found = [message.value() for message in apache_rig.read(apache_rig.topic_1, len(values), extra_s=2)]
    assert Counter(found) == Counter(values)


def test_who_is_overtaken_says_so_and_has_written_nothing_since(
    apache_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [b"%d" % number for number in range(30)]
    write(apache_rig, [refused(apache_rig.topic_1, value) for value in values])
    for name, setting in apache_rig.environment.items():
        monkeypatch.setenv(name, setting)
    read = letters.read

    def overtaken(properties: Mapping[str, str], meant: Selection) -> list[letters.Letter]:
        monkeypatch.setattr(letters, "read", read)
        found = read(properties, meant)
        assert letters.replay(apache_rig.properties, selection(apache_rig)) == Replayed(30, 0)
        return found

    monkeypatch.setattr(letters, "read", overtaken)
    done = CliRunner().invoke(app, ["dead-letters", "replay"])

    assert done.exit_code == 1
    assert done.stderr == (
        "fraudctl: another replay has started and continues where this one stopped, after 0 dead letters\n"
    )
    found = [message.value() for message in apache_rig.read(apache_rig.topic_1, len(values), extra_s=2)]
    assert Counter(found) == Counter(values)


def test_what_a_replay_had_open_when_it_died_is_put_back_once(apache_rig: Rig) -> None:
    write(apache_rig, [refused(apache_rig.topic_1, b"letter")])
    died = Producer({**apache_rig.properties, "transactional.id": "fraudctl-dead-letters", "log_level": 0})
    died.init_transactions(20)
    died.begin_transaction()
    died.produce(apache_rig.topic_1, b"letter")
    died.produce(dead_letter_topic(apache_rig.topic_1), headers=[("dlq-replayed", b"0:0")], partition=0)
    died.flush(10)

    assert letters.replay(apache_rig.properties, selection(apache_rig)) == Replayed(1, 0)

    with pytest.raises(KafkaException):
        died.commit_transaction(10)
    assert [each.value() for each in apache_rig.read(apache_rig.topic_1, 1, extra_s=2)] == [b"letter"]


def test_a_mark_behind_an_open_transaction_is_waited_for(apache_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    write(apache_rig, [refused(apache_rig.topic_1, b"letter")])
    (letter,) = apache_rig.read(dead_letter_topic(apache_rig.topic_1), 1)
    service = Producer({**apache_rig.properties, "transactional.id": apache_rig.topic_1, "log_level": 0})
    service.init_transactions(20)
    batches = letters.batches

    def meanwhile(chosen: Iterable[letters.Letter]) -> Iterable[list[letters.Letter]]:
        """A service begins to write dead letters where the mark is about to be written."""
        service.begin_transaction()
        service.produce(letter.topic(), b"aborted", partition=letter.partition())
        service.flush(10)
        return batches(chosen)

    monkeypatch.setattr(letters, "batches", meanwhile)
    assert letters.replay(apache_rig.properties, selection(apache_rig)) == Replayed(1, 0)
    monkeypatch.setattr(letters, "batches", batches)
    ends = letters.ends
    looks: list[list[TopicPartition]] = []

    def looking(properties: Mapping[str, str], names: Sequence[str]) -> list[TopicPartition]:
        looks.append(ends(properties, names))
        return looks[-1]

    monkeypatch.setattr(letters, "ends", looking)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(letters.replay, apache_rig.properties, selection(apache_rig))
        until(lambda: len(looks) > 3 or second.done(), what="a second look at the open transaction")
        service.abort_transaction(10)
        assert second.result(60) == Replayed(0, 1)
    assert [each.value() for each in apache_rig.read(apache_rig.topic_1, 1, extra_s=1)] == [b"letter"]


def test_more_than_a_thousand_want_a_yes(apache_rig: Rig) -> None:
    topic = apache_rig.topic_1
    values = [b"%d" % number for number in range(1001)]
    write(apache_rig, [refused(topic, value) for value in values])

    unasked = fraudctl(apache_rig, "replay")

    assert unasked.returncode == 2
    assert unasked.stderr == "fraudctl: 1,001 dead letters would be replayed. Add --yes to replay more than 1,000.\n"
    assert apache_rig.read(topic, 0, extra_s=1) == []
    assert marks(apache_rig.read(dead_letter_topic(topic), len(values))) == []
    assert fraudctl(apache_rig, "replay", "--yes").stdout == "replayed: 1,001 dead letters\n"
    assert Counter(each.value() for each in apache_rig.read(topic, len(values), extra_s=1)) == Counter(values)
    assert len(marks(apache_rig.read(dead_letter_topic(topic), 2 * len(values)))) == len(values)


def test_a_refused_transaction_is_saved_fixed_and_predicted(apache_rig: Rig, registry: Registry) -> None:
    (transaction,) = make_transactions(1)
    wrong = json.dumps(json.loads(encode_transaction(transaction)) | {"zip": "28372a"}).encode()
    apache_rig.put(apache_rig.topic_1, [wrong])
    apache_rig.start("predictor", MLFLOW_TRACKING_URI=registry.uri)
    (name,) = ids_of(apache_rig, apache_rig.topic_1, 1).values()
    path = apache_rig.directory / "value.json"

    assert "zip" in fraudctl(apache_rig, "show", name, "--save", path).stdout
    path.write_bytes(path.read_bytes().replace(b'"28372a"', str(transaction.zip).encode()))
    done = fraudctl(apache_rig, "replay", name, "--value", path)

    assert done.returncode == 0, done.stderr
    (_, again) = sorted(apache_rig.read(apache_rig.topic_1, 2), key=lambda message: message.timestamp()[1])
    assert (again.value(), again.key()) == (path.read_bytes(), transaction.key)
    (predicted,) = apache_rig.read(apache_rig.topic_2, 1, timeout_s=60)
    assert decode_prediction(predicted.value()).identity == transaction.identity
    assert fraudctl(apache_rig, "list").stdout.endswith("1 dead letter\n")


@pytest.mark.parametrize("key", [b"mine", b"", None])
def test_a_fixed_value_keeps_the_key_that_was_there(apache_rig: Rig, key: bytes | None) -> None:
    value = b"still wrong" if key is None else encode_transaction(make_transactions(1)[0])
    write(apache_rig, [refused(apache_rig.topic_1, b"wrong", key=key)])
    (name,) = ids_of(apache_rig, apache_rig.topic_1, 1).values()
    (apache_rig.directory / "fixed").write_bytes(value)

    assert fraudctl(apache_rig, "replay", name, "--value", "fixed").returncode == 0

    (message,) = apache_rig.read(apache_rig.topic_1, 1)
    assert (message.value(), message.key()) == (value, key)


def test_a_value_too_large_is_refused_and_leaves_nothing_open(apache_rig: Rig) -> None:
    write(apache_rig, [refused(apache_rig.topic_1, b"letter")])
    (name,) = ids_of(apache_rig, apache_rig.topic_1, 1).values()
    for size in (1_500_000, 3_000_000):  # beyond what the topic takes, and beyond what the producer sends
        (apache_rig.directory / "fixed").write_bytes(os.urandom(size))

        done = fraudctl(apache_rig, "replay", name, "--value", "fixed")

        assert done.returncode == 2
        assert done.stderr.startswith("fraudctl: Kafka: ")
        assert "too large" in done.stderr
        assert done.stderr.count("\n") == 1
    assert fraudctl(apache_rig, "replay", name).stdout == "replayed: 1 dead letter\n"
    assert [each.value() for each in apache_rig.read(apache_rig.topic_1, 1)] == [b"letter"]


def test_an_id_that_is_none_and_a_missing_topic_are_one_line(apache_rig: Rig) -> None:
    dlq = dead_letter_topic(apache_rig.topic_1)
    write(apache_rig, [refused(apache_rig.topic_1, b"letter")])
    (name,) = ids_of(apache_rig, apache_rig.topic_1, 1).values()
    unknown = [
        fraudctl(apache_rig, "show", f"{dlq}:0:99"),
        fraudctl(apache_rig, "show", f"{dlq}:99:0"),
        fraudctl(apache_rig, "replay", name, f"{dlq}:0:99"),
    ]
    client = AdminClient(apache_rig.properties)
    client.delete_topics([dead_letter_topic(apache_rig.topic_2)])[dead_letter_topic(apache_rig.topic_2)].result(20)
    missing = [fraudctl(apache_rig, "list"), fraudctl(apache_rig, "replay")]

    for done in (*unknown, *missing):
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
    assert all(f"fraudctl: there is no dead letter {dlq}:" in done.stderr for done in unknown)
    hint = "or this login has no access to it. Run `fraudctl topics check`."
    line = f"fraudctl: there is no topic {dead_letter_topic(apache_rig.topic_2)}, {hint}\n"
    assert [done.stderr for done in missing] == [line, line]
    assert apache_rig.read(apache_rig.topic_1, 0) == []


LARGE = b"{" + b" " * 3_000_000 + b"}"


def put_a_cut_letter(rig: Rig) -> tuple[str, TopicPartition]:
    """A record that is too large for a dead letter, and the letter as the predictor writes it. Returns its ID."""
    producer = Producer({**rig.properties, "log_level": 0, "compression.type": "lz4", "message.max.bytes": "10000000"})
    producer.produce(rig.topic_1, LARGE, key=b"card", headers=[("trace", b"7")])
    assert producer.flush(20) == 0
    (record,) = rig.read(rig.topic_1, 1)
    letter = dead_letter(record, "not a transaction", group="predictor")
    assert len(letter.value or b"") == 512 * 1024
    assert dict(letter.headers)["dlq-value-bytes"] == str(len(LARGE)).encode()
    assert dict(letter.headers)["dlq-value-sha256"] == hashlib.sha256(LARGE).hexdigest().encode()
    write(rig, [letter])
    (read,) = rig.read(letter.topic, 1)
    return identifier(read), TopicPartition(*coordinates(record))


def test_a_cut_letter_is_replayed_whole(apache_rig: Rig) -> None:
    name, place = put_a_cut_letter(apache_rig)

    shown = fraudctl(apache_rig, "show", name)
    assert f"524,288 of {len(LARGE):,} bytes" in shown.stdout
    done = fraudctl(apache_rig, "replay", name)

    assert done.returncode == 0, done.stderr
    found = [
        each
        for each in apache_rig.read(apache_rig.topic_1, 2)
        if coordinates(each)[2] != place.offset or each.partition() != place.partition
    ]
    assert [(each.value(), each.key(), each.headers()) for each in found] == [(LARGE, b"card", [("trace", b"7")])]


def test_a_cut_letter_whose_record_is_gone_is_refused_by_name(apache_rig: Rig) -> None:
    name, place = put_a_cut_letter(apache_rig)
    admin = AdminClient({**apache_rig.properties, "log_level": 0})
    (deleted,) = admin.delete_records([TopicPartition(place.topic, place.partition, place.offset + 1)]).values()
    deleted.result(20)

    done = fraudctl(apache_rig, "replay", name)

    assert done.returncode == 2
    assert name in done.stderr
    assert "--value FILE" in done.stderr
    assert len(done.stderr.splitlines()) == 1
