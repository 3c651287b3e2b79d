"""The producer: polls the payments API into topic_1."""

import time
from threading import Event

import requests
import structlog
from confluent_kafka import KafkaError, Message, Producer
from pydantic import AnyHttpUrl, Field

from services.producer.api import fetch
from services.producer.recent import Recent
from shared import kafka, service
from shared.dead_letters import SUFFIX, refusal
from shared.delivery import enqueue
from shared.errors import Outage, Poison
from shared.flow import Flow
from shared.kafka import Record
from shared.records import Rows, encode_transaction, read_split
from shared.retry import delay_s
from shared.settings import Seconds, ServiceSettings, kafka_properties

log = structlog.get_logger()

_FLUSH_S = 8.0  # containers get ten seconds to stop


class ProducerSettings(ServiceSettings):
    """What the producer reads from its environment."""

    api_url: AnyHttpUrl = Field(
        AnyHttpUrl("https://real-time-payments-api.herokuapp.com/current-transactions"),
        description="Where the transactions are polled from",
    )
    api_timeout_seconds: float = Field(30.0, gt=0, description="Longest wait for an answer")
    poll_interval_seconds: Seconds = Field(15.0, description="Time from one poll to the next; 0 is back to back")
    backoff_initial_seconds: Seconds = Field(1.0, description="First wait after a failed poll; doubled each time")
    backoff_max_seconds: Seconds = Field(60.0, description="Longest wait between two polls that fail")
    recent_identities: int = Field(100_000, ge=1, description="How many transactions are remembered, to skip repeats")


def serve(settings: ProducerSettings, shutdown: Event) -> None:
    """Poll until shutdown, then flush."""
    producer = kafka.producer(kafka_properties(settings), on_failure=_log_failure)
    recent = Recent(settings.recent_identities)
    flow = Flow("fetched")
    failures = 0
    with requests.Session() as session:
        while not shutdown.is_set():
            due = time.monotonic() + settings.poll_interval_seconds
            try:
                rows = read_split(fetch(session, str(settings.api_url), timeout_s=settings.api_timeout_seconds))
                produced = _produce(producer, settings.topic_1, rows, recent, shutdown)
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
                flow.add(records=fetched, produced=produced, repeats=fetched - produced, refused=refused)
            _serve_until(producer, due, shutdown)
    flow.report()
    if undelivered := producer.flush(_FLUSH_S):
        log.error("undelivered", records=undelivered)


def _produce(producer: Producer, topic: str, rows: Rows, recent: Recent, shutdown: Event) -> int:
    """Write the new transactions to `topic`, and the rows that could not be read to its dead letters."""
    fresh = recent.new(rows.transactions)
    records = [Record(topic, encode_transaction(transaction), transaction.key, []) for transaction in fresh]
    for bad in rows.bad:
        log.warning("row_refused", reason=bad.reason)
        records.append(Record(topic + SUFFIX, bad.value, None, refusal(topic, bad.reason, by="producer")))
    for record in records:
        enqueue(producer, record, shutdown)
    return len(fresh)


def _serve_until(producer: Producer, due: float, shutdown: Event) -> None:
    """Let the producer report failures until `due` (monotonic seconds) or the shutdown."""
    producer.poll(0)
    while not shutdown.is_set() and (left := due - time.monotonic()) > 0:
        producer.poll(min(left, 0.5))


def _log_failure(error: KafkaError, message: Message) -> None:
    log.error("not_delivered", topic=message.topic(), reason=error.str())


if __name__ == "__main__":
    service.run("producer", ProducerSettings, serve)
