"""The producer: polls the payments API into topic_1."""

import time
from collections.abc import Sequence
from threading import Event
from typing import NamedTuple

import requests
import structlog
from confluent_kafka import KafkaException, Message, Producer
from pydantic import AnyHttpUrl, Field

from services.producer.api import fetch
from services.producer.recent import Recent
from shared import kafka, service
from shared.dead_letters import SUFFIX, refusal
from shared.delivery import enqueue
from shared.errors import Outage, Poison
from shared.flow import Flow
from shared.kafka import Record, headers
from shared.records import BadRow, Transaction, encode_transaction, read_split
from shared.retry import delay_s
from shared.settings import Backoff, ServiceSettings, kafka_properties

log = structlog.get_logger()

_FLUSH_S = 8.0  # containers get ten seconds to stop
_FLUSH_STEP_S = 1.0
_LARGEST_REFUSED_ROW = 512 * 1024  # bytes; a transaction has a few hundred, and no topic takes much more than this


class ProducerSettings(ServiceSettings):
    """What the producer reads from its environment."""

    api_url: AnyHttpUrl = Field(
        AnyHttpUrl("https://real-time-payments-api.herokuapp.com/current-transactions"),
        description="Where the transactions are polled from",
    )
    api_timeout_seconds: float = Field(30.0, gt=0, description="Longest wait for an answer")
    poll_interval_seconds: float = Field(15.0, ge=0, description="Time from one poll to the next; 0 is back to back")
    backoff_initial_seconds: Backoff = Field(1.0, description="First wait after a failed poll; doubled each time")
    backoff_max_seconds: Backoff = Field(60.0, description="Longest wait between two polls that fail")
    recent_identities: int = Field(100_000, ge=1, description="How many transactions are remembered, to skip repeats")


class Undelivered(NamedTuple):
    """A record that the broker refused, and why."""

    reason: str
    record: Record


def serve(settings: ProducerSettings, shutdown: Event) -> None:
    """Poll until shutdown, then flush."""
    undelivered: list[Undelivered] = []
    producer = kafka.producer(
        kafka_properties(settings),
        on_failure=lambda error, message: undelivered.append(Undelivered(error.str(), _record(message))),
    )
    recent = Recent(settings.recent_identities)
    flow = Flow("fetched")
    failures = 0
    with requests.Session() as session:
        while not shutdown.is_set():
            due = time.monotonic() + settings.poll_interval_seconds
            try:
                if undelivered:
                    _write_again(producer, undelivered, shutdown)
                rows = read_split(fetch(session, str(settings.api_url), timeout_s=settings.api_timeout_seconds))
                fresh = recent.new(rows.transactions)
                records = [*_records(fresh, settings.topic_1), *_dead_letters(rows.bad, settings.topic_1)]
                _write(producer, records, undelivered, shutdown)
            except (Outage, Poison) as problem:
                asked_s = problem.retry_after_s if isinstance(problem, Outage) else 0.0
                backoff_s = delay_s(
                    failures, initial_s=settings.backoff_initial_seconds, max_s=settings.backoff_max_seconds
                )
                due = max(due, time.monotonic() + max(backoff_s, asked_s))
                failures += 1
                retry_in_s = round(due - time.monotonic(), 1)
                log.warning("poll_failed", reason=str(problem), failures=failures, retry_in_s=retry_in_s)
            else:
                if failures:
                    log.info("polling_again", failures=failures)
                failures = 0
                fetched, refused = len(rows.transactions), len(rows.bad)
                flow.add(records=fetched, produced=len(fresh), repeats=fetched - len(fresh), refused=refused)
            _serve_until(producer, due, shutdown)
    flow.report()
    if left := producer.flush(_FLUSH_S) + len(undelivered):
        log.error("undelivered", records=left)


def _records(transactions: Sequence[Transaction], topic: str) -> list[Record]:
    return [Record(topic, encode_transaction(each), each.key, []) for each in transactions]


def _dead_letters(rows: Sequence[BadRow], topic: str) -> list[Record]:
    """The rows that could not be read, as records for the dead letters of `topic`."""
    for row in rows:
        log.warning("row_refused", reason=row.reason)
    return [
        Record(topic + SUFFIX, row.value[:_LARGEST_REFUSED_ROW], None, refusal(topic, row.reason, by="producer"))
        for row in rows
    ]


def _write(producer: Producer, records: Sequence[Record], undelivered: list[Undelivered], shutdown: Event) -> None:
    for record in records:
        try:
            enqueue(producer, record, shutdown)
        except KafkaException as exception:
            undelivered.append(Undelivered(exception.args[0].str(), record))


def _write_again(producer: Producer, undelivered: list[Undelivered], shutdown: Event) -> None:
    """What the broker refused, for want of a topic or of a right, is written before anything new is fetched.

    Raises Outage if it is refused again.
    """
    again, undelivered[:] = undelivered[:], []
    _write(producer, [record for _, record in again], undelivered, shutdown)
    while producer.flush(_FLUSH_STEP_S) and not shutdown.is_set():
        pass
    if undelivered:
        raise Outage(f"{len(undelivered)} records are not delivered: {undelivered[0].reason}")


def _serve_until(producer: Producer, due: float, shutdown: Event) -> None:
    """Let the producer report failures until `due` (monotonic seconds) or the shutdown."""
    producer.poll(0)
    while not shutdown.is_set() and (left := due - time.monotonic()) > 0:
        producer.poll(min(left, 0.5))


def _record(message: Message) -> Record:
    return Record(message.topic() or "", message.value(), message.key(), headers(message))


if __name__ == "__main__":
    service.run("producer", ProducerSettings, serve)
