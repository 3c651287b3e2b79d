"""The producer: polls the payments API into topic_1, by way of a journal on disk."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Event

import requests
import structlog
from confluent_kafka import KafkaException, TopicPartition
from pydantic import AnyHttpUrl, Field

from services.producer.api import fetch
from services.producer.journal import Entry, Journal, open_journal
from shared import delivery, kafka, service
from shared.dead_letters import SUFFIX, refusal
from shared.delivery import Delivery
from shared.errors import Outage, Poison
from shared.flow import Flow
from shared.kafka import Record
from shared.records import BadRow, Transaction, encode_transaction, read_split
from shared.retry import delay_s, until_over
from shared.settings import Backoff, DeliveryGuarantee, ServiceSettings, kafka_properties

log = structlog.get_logger()

_GROUP = "producer"
_BATCH = 1000
_IDLE_S = 0.5
_LARGEST_REFUSED_ROW = 512 * 1024  # bytes; a transaction has a few hundred, and no topic takes much more than this
_CLOCK_SLACK_MS = 60_000


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
    delivery: DeliveryGuarantee = Field("exactly_once", description="exactly_once or at_least_once")
    journal_directory: Path = Field(
        Path("journal"), description="Where it keeps what it fetched; outlives the container"
    )
    recent_identities: int = Field(100_000, ge=1, description="How many transactions are remembered, to skip repeats")
    max_waiting_records: int = Field(100_000, ge=1, description="With so many not on the topic yet, it stops polling")


def serve(settings: ProducerSettings, shutdown: Event) -> None:
    """Poll until shutdown, then write what waits."""
    properties = kafka_properties(settings)
    journal = open_journal(settings.journal_directory, remembered=settings.recent_identities)
    deliver = delivery.delivery(
        settings.delivery, properties=properties, transactional_id=f"producer-{journal.id}", shutdown=shutdown
    )
    if left := len(journal):
        log.info("left_by_predecessor", records=left)
    polled, over = Event(), Event()
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as worker:
        writing = worker.submit(
            write, journal, deliver, properties, settings=settings, polled=polled, over=over, shutdown=shutdown
        )
        writing.add_done_callback(lambda _: shutdown.set())  # whatever ends it ends the polling
        try:
            poll(settings, journal, polled, shutdown)
        finally:
            over.set()
            polled.set()
        try:
            writing.result()
        except Outage as outage:
            log.warning("stopped_in_outage", reason=str(outage), left_for_later=len(journal))
    deliver.close()
    journal.close()


def poll(settings: ProducerSettings, journal: Journal, polled: Event, shutdown: Event) -> None:
    """Fetch into the journal until shutdown; `polled` is set whenever something came."""
    flow = Flow("fetched")
    failures = 0
    with requests.Session() as session:
        while not shutdown.is_set():
            due = time.monotonic() + settings.poll_interval_seconds
            try:
                if (waiting := len(journal)) >= settings.max_waiting_records:
                    raise Outage(f"{waiting} records wait to be written")
                rows = read_split(fetch(session, str(settings.api_url), timeout_s=settings.api_timeout_seconds))
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
                fetched = [*_records(rows.transactions, settings.topic_1), *_dead_letters(rows.bad, settings.topic_1)]
                fresh = _keep(fetched, journal, settings, shutdown)
                polled.set()
                flow.add(records=len(fetched), fresh=fresh, repeats=len(fetched) - fresh, refused=len(rows.bad))
            shutdown.wait(max(0.0, due - time.monotonic()))
    flow.report()


def write(
    journal: Journal,
    deliver: Delivery,
    properties: dict[str, str],
    *,
    settings: ProducerSettings,
    polled: Event,
    over: Event,
    shutdown: Event,
) -> None:
    """Bring what waits in the journal onto its topics, in order, until polling is over.

    Raises Outage if the shutdown comes while Kafka is away.
    """
    in_doubt = True  # perhaps what waits was written by a predecessor, or by a try whose answer was lost

    def step() -> bool:
        nonlocal in_doubt
        if in_doubt:
            deliver.open()
            journal.written(_on_topics(journal.waiting(), properties))
        batch = journal.waiting(_BATCH)
        in_doubt = bool(batch)
        if batch:
            deliver.deliver([entry.record for entry in batch])
            journal.written(batch)
            in_doubt = False
        return bool(batch)

    while True:
        last = over.is_set()
        polled.clear()
        while until_over(
            step,
            shutdown=shutdown,
            initial_s=settings.backoff_initial_seconds,
            max_s=settings.backoff_max_seconds,
        ):
            pass
        if last:
            return
        polled.wait(_IDLE_S)


def _records(transactions: Iterable[Transaction], topic: str) -> list[tuple[bytes, Record]]:
    """The records with what makes each known."""
    return [
        (f"{each.unix_time} {each.trans_num}".encode(), Record(topic, encode_transaction(each), each.key, []))
        for each in transactions
    ]


def _dead_letters(rows: Sequence[BadRow], topic: str) -> list[tuple[bytes, Record]]:
    """The rows that could not be read, as records for the dead letters of `topic`."""
    for row in rows:
        log.warning("row_refused", reason=row.reason)
    return [
        (
            hashlib.sha256(row.value).digest(),
            Record(topic + SUFFIX, row.value[:_LARGEST_REFUSED_ROW], None, refusal(topic, row.reason, by="producer")),
        )
        for row in rows
    ]


def _keep(
    fetched: Sequence[tuple[bytes, Record]], journal: Journal, settings: ProducerSettings, shutdown: Event
) -> int:
    """Into the journal, however long its disk is full: what was fetched is not let go. Returns how many are new."""
    return until_over(
        lambda: journal.add(fetched),
        shutdown=shutdown,
        initial_s=settings.backoff_initial_seconds,
        max_s=settings.backoff_max_seconds,
    )


def _on_topics(entries: Sequence[Entry], properties: dict[str, str]) -> list[Entry]:
    """Those that lie on their topics already. Raises Outage."""
    if not entries:
        return []
    since_ms = entries[0].fetched_ms - _CLOCK_SLACK_MS
    starts = chain.from_iterable(
        _since(properties, topic, since_ms) for topic in sorted({entry.record.topic for entry in entries})
    )
    wanted = {(entry.record.topic, entry.record.value) for entry in entries}
    there = (
        (message.topic(), message.value()) for message in kafka.read_to_end(properties, list(starts), group=_GROUP)
    )
    written = wanted.intersection(there)
    return [entry for entry in entries if (entry.record.topic, entry.record.value) in written]


def _since(properties: dict[str, str], topic: str, since_ms: int) -> list[TopicPartition]:
    """Where the records of the topic begin that are not older. Raises Outage."""
    client = kafka.consumer(properties, group=_GROUP)
    try:
        known = client.list_topics(topic, timeout=10).topics[topic]
        if known.error:
            raise Outage(f"{topic}: {known.error.str()}")
        starts = [TopicPartition(topic, partition, since_ms) for partition in known.partitions]
        found = client.offsets_for_times(starts, timeout=10)
    except KafkaException as error:
        raise Outage(f"Kafka: {error.args[0].str()}") from None
    finally:
        client.close()
    return [each for each in found if each.offset >= 0]


if __name__ == "__main__":
    service.run("producer", ProducerSettings, serve)
