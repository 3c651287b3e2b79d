"""Measure how soon a transaction on topic_1 becomes a prediction, a mail and a row in the table.

Measure the time to work off a backlog.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import sqlalchemy as sa

from benchmarks.load import Bench, backlog, watch
from benchmarks.measure import Bar, Figure, Section, percentiles, side_by_side
from benchmarks.sink import database
from rehearsal.ledger import TopicReader, mailed
from rehearsal.stack import SENDER
from sandbox.processes import Process, StandInError
from shared.kafka import topics
from shared.kafka.clients import producer
from shared.records import encode_transaction

_WARM_UP_S = 5.0
_TICK_S = 0.002
_PATIENCE_S = 30.0
_FRAUD_RATE = 0.01  # causes enough mails to measure at 100 tx/s


def latencies(bench: Bench, *, rounds: int, rates: Sequence[int], seconds: float) -> Section:
    """Measure the latencies at each rate, alternating between exactly-once and at-least-once delivery."""
    rows: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for rate in rates:
            for guarantee in ("exactly_once", "at_least_once"):
                row = rows.setdefault(f"{rate:,} tx/s, {guarantee.replace('_', ' ')}", {})
                for name, value in _measure(bench, rate, seconds, guarantee).items():
                    row.setdefault(name, []).append(value)
    found = {label: {name: Figure(tuple(values)) for name, values in row.items()} for label, row in rows.items()}
    once, least = found.get("500 tx/s, exactly once", {}), found.get("500 tx/s, at least once", {})
    return Section(
        "From topic_1 to a prediction, a mail, a row",
        "The times are in milliseconds, measured from the moment when a transaction is written to `topic_1`. "
        'The columns "topic_2" show the time until the prediction is visible on `topic_2`. '
        'The columns "mail" show the time until the mail server has accepted the mail. '
        'The columns "row" show the time until the row is committed. '
        f"Each measurement takes {seconds:.0f} s, after a warm-up of {_WARM_UP_S:.0f} s. "
        "Conditions: Apache Kafka, 6 partitions, 1 % frauds",
        tuple(next(iter(found.values()))),
        found,
        [
            Bar(
                "500 tx/s, exactly once: time until the prediction is visible, p99, ms",
                once["topic_2 p99"],
                150,
                at_most=True,
            ),
            Bar(
                "500 tx/s, at least once: time until the prediction is visible, p99, ms",
                least["topic_2 p99"],
                30,
                at_most=True,
            ),
            Bar("500 tx/s, exactly once: mail accepted, p99 ms", once["mail p99"], 300, at_most=True),
            Bar("500 tx/s, at least once: mail accepted, p99 ms", least["mail p99"], 300, at_most=True),
        ]
        if once
        else [],
    )


def catching_up(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Measure how long the predictor and the db_sink together take to bring a backlog from topic_1 into the table."""
    source = bench.backlog(rows)
    found = side_by_side(
        {
            guarantee.replace("_", " "): partial(_caught_up, bench, source, rows, guarantee)
            for guarantee in ("exactly_once", "at_least_once")
        },
        rounds=rounds,
    )
    return Section(
        "Catching up",
        "A predictor scores a backlog from `topic_1`, and a db_sink stores the rows in PostgreSQL. "
        f"The backlog of {rows:,} rows is what arrives in an hour at {rows // 3600} tx/s. "
        "Conditions: Apache Kafka, 6 partitions",
        ("seconds", "rows/s", "CPU s a million"),
        found,
    )


def _caught_up(bench: Bench, source: str, rows: int, guarantee: str) -> dict[str, float]:
    (target,) = bench.topics("out")
    with database(bench) as url:
        own = {"TOPIC_1": source, "TOPIC_2": target, "DATABASE_URL": url, "DELIVERY": guarantee}
        own |= {"PREDICTOR_GROUP": target, "DB_SINK_GROUP": f"{target}-sink"}
        services = [bench.service(name, own) for name in ("predictor", "db_sink")]
        try:
            with bench.committed(f"{target}-sink", target) as committed:
                for each in services:
                    each.spawn()
                usage = watch(services, committed, rows=rows)  # also counts Kafka's transaction markers, about 0.5 %
            wait_until(lambda: _rows(url) == rows, "rows", services)
        finally:
            for each in services:
                each.stop()
    found = usage.quantities()
    return {"seconds": rows / found["rows/s"], **found}


def _measure(bench: Bench, rate: int, seconds: float, guarantee: str) -> dict[str, float]:
    topic_1, topic_2 = bench.topics("in", "out")
    mail = bench.directory / "mail"
    with database(bench) as url:
        groups = {group: f"{topic_2}-{group}" for group in ("PREDICTOR_GROUP", "ALERTER_GROUP", "DB_SINK_GROUP")}
        own = {"TOPIC_1": topic_1, "TOPIC_2": topic_2, "DATABASE_URL": url, "DELIVERY": guarantee, **groups}
        services = [bench.service(name, own) for name in ("predictor", "alerter", "db_sink")]
        reader = TopicReader(bench.properties, topic_1=topic_1)
        reader.start(topics.ends(bench.properties, [topic_1, topic_2]))
        try:
            for each in services:
                each.spawn()
            for each in services:
                each.wait_ready()
            since_ms = time.time() * 1000 + 1000 * _WARM_UP_S
            rows = int(rate * (_WARM_UP_S + seconds))
            stream(bench, topic_1, rate, rows)
            wait_until(lambda: len(reader.topics.visible_ms) >= rows, "predictions", services)
            seen = reader.topics
            frauds = seen.frauds
            wait_until(lambda: len(list(mail.glob("*.eml"))) >= len(frauds), "mails", services)
            wait_until(lambda: _rows(url) >= rows, "rows", services)
        finally:
            for each in services:
                each.stop()
            reader.stop()
        mailed_ms, _ = mailed(mail, frauds, since_ms=0, sender=SENDER)
        committed_ms = _committed(url)
    shutil.rmtree(mail, ignore_errors=True)
    mail.mkdir()
    began = {identity: at for identity, at in seen.produced_ms.items() if at >= since_ms}
    found: dict[str, float] = {}
    for name, ends in (("topic_2", seen.visible_ms), ("mail", mailed_ms), ("row", committed_ms)):
        took = [ends[identity] - at for identity, at in began.items() if identity in ends]
        found |= {f"{name} {what}": value for what, value in percentiles(took).items()}
    return found


def stream(bench: Bench, topic: str, rate: int, rows: int) -> None:
    """Write the first `rows` rows of the backlog to the topic, at `rate` rows per second."""
    client = producer({**bench.properties, "linger.ms": "0"})
    records = [(encode_transaction(each), each.key) for each in backlog(rows, fraud_rate=_FRAUD_RATE)]
    began, sent = time.monotonic(), 0
    while sent < rows:
        due = min(rows, int(rate * (time.monotonic() - began)))
        for value, key in records[sent:due]:
            client.produce(topic, value=value, key=key)
        client.poll(0)
        sent = due
        time.sleep(_TICK_S)
    client.flush()


def wait_until(
    condition: Callable[[], bool], what: str, services: Sequence[Process], *, patience_s: float = _PATIENCE_S
) -> None:
    """Wait until the condition holds. Raises StandInError if that takes longer than `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise StandInError(f"{what} did not arrive within {patience_s:.0f} s: {services[0].last_line()}")
        time.sleep(0.1)


def _rows(url: str) -> int:
    with sa.create_engine(url).connect() as connection:
        return int(connection.execute(sa.text("SELECT count(*) FROM transactions")).scalar_one())


def _committed(url: str) -> Mapping[tuple[str, int], float]:
    """Return when each row was committed to the database (epoch ms)."""
    query = "SELECT trans_num, unix_time, 1000 * EXTRACT(EPOCH FROM pg_xact_commit_timestamp(xmin)) FROM transactions"
    with sa.create_engine(url).connect() as connection:
        return {(row[0], row[1]): float(row[2]) for row in connection.execute(sa.text(query))}
