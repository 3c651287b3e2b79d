"""Compare the producer with plain librdkafka clients, and the alerter with a plain SMTP session."""

import smtplib
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

from benchmarks.load import Bench, backlog, memory_bar, topic_1_records, watch
from benchmarks.measure import Section, side_by_side
from rehearsal.stack import RECIPIENT, SENDER
from sandbox.payments_api import PaymentsApi
from services.alerter.alarm import Alarm
from services.alerter.mail import Composer
from shared.kafka import topics
from shared.kafka.clients import consumer, producer
from shared.kafka.messages import Record
from shared.provenance import Provenance, to_headers
from shared.records import Prediction, decode_prediction, encode_prediction, encode_transaction
from shared.stream.delivery import enqueue

_WHO = Provenance("fraud", "1", 0.99, 1_730_134_684_025, 0, 12_345)


def producing(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Compare the producer with plain librdkafka clients.

    Unlike these clients, the producer keeps a journal and uses Kafka transactions.
    """
    found = side_by_side(
        {
            "librdkafka, produce": lambda: _produced(bench, rows),
            "librdkafka, consume": lambda: _consumed(bench, rows),
            "producer": lambda: _polled(bench, rows),
        },
        rounds=rounds,
    )
    return Section(
        "The producer, and the client alone",
        f"Conditions: {rows:,} rows, Apache Kafka, lz4 compression. Each response of the API has up to 500 rows",
        ("rows/s", "CPU s a million", "MB"),
        found,
        [memory_bar("producer", found["producer"]["MB"])],
    )


def alerting(bench: Bench, *, rounds: int, mails: int) -> Section:
    """Compare the alerter with a plain SMTP session. Here, the alerter sends one mail per record."""
    (source,) = bench.topics("frauds")
    headers = to_headers(_WHO)
    values = [encode_prediction(encode_transaction(each), 1) for each in backlog(mails)]
    keys = [each.key for each in backlog(mails)]
    bench.fill(Record(source, value, key, headers) for value, key in zip(values, keys, strict=True))
    predictions = list(map(decode_prediction, values))
    found = side_by_side(
        {
            "one SMTP session, prepared mails": lambda: _sent(bench, predictions),
            "alerter": lambda: _alerted(bench, source, mails),
        },
        rounds=rounds,
    )
    return Section(
        "The alerter, and a mail session alone",
        f"Conditions: {mails:,} frauds, each with its own mail and its own commit. "
        "Apache Kafka and the mail server (aiosmtpd) run on the same cores as the alerter",
        ("mails/s", "CPU s a million", "MB"),
        found,
        [memory_bar("alerter", found["alerter"]["MB"])],
    )


def _produced(bench: Bench, rows: int) -> dict[str, float]:
    (target,) = bench.topics("produced")
    records = list(topic_1_records(target, rows))
    client = producer(bench.properties)
    began = time.monotonic()
    enqueue(client, records, Event())
    client.flush()
    return {"rows/s": rows / (time.monotonic() - began)}


def _consumed(bench: Bench, rows: int) -> dict[str, float]:
    source = bench.backlog(rows)
    reader = consumer(bench.properties, group=source)
    ends = topics.ends(bench.properties, [source])
    for end in ends:
        end.offset = 0
    reader.assign(ends)
    done = 0
    while not done:
        done = len(reader.consume(1, 1.0))
    began = time.monotonic()
    while done < rows:
        done += len(reader.consume(10_000, 0.5))
    took = time.monotonic() - began
    reader.close()
    return {"rows/s": rows / took}


def _polled(bench: Bench, rows: int) -> dict[str, float]:
    (target,) = bench.topics("polled")
    directory = bench.directory / uuid.uuid4().hex[:8]
    options = ("--transactions", str(rows), "--rate", "0", "--max-rows", "500")
    with PaymentsApi(*options, log=directory / "api.log") as api:
        settings = {"TOPIC_1": target, "API_URL": api.url, "JOURNAL_DIRECTORY": str(directory / "journal")}
        with bench.service("producer", settings) as process, bench.written(target) as written:
            return watch([process], written, rows=rows).quantities()


def _sent(bench: Bench, predictions: list[Prediction]) -> dict[str, float]:
    now = datetime.now(UTC)
    composer = Composer(sender=SENDER, recipients=[RECIPIENT])
    mails = [composer.single(Alarm(each, _WHO), now=now) for each in predictions]
    with smtplib.SMTP("127.0.0.1", bench.stack.mailbox.port) as session:
        began = time.monotonic()
        for mail in mails:
            session.send_message(mail)
        took = time.monotonic() - began
    _empty(bench.stack.mailbox.directory)
    return {"mails/s": len(mails) / took}


def _alerted(bench: Bench, source: str, mails: int) -> dict[str, float]:
    group = f"alerter-{uuid.uuid4().hex[:8]}"
    process = bench.service("alerter", {"TOPIC_2": source, "ALERTER_GROUP": group})
    usage = bench.drain([process], group=group, topic=source, rows=mails)
    _empty(bench.stack.mailbox.directory)
    quantities = usage.quantities()
    return {"mails/s": quantities.pop("rows/s"), **quantities}


def _empty(mail: Path) -> None:
    for path in mail.glob("*.eml"):
        path.unlink()
