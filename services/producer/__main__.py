"""The producer: polls the payments API and writes the transactions to topic_1.

Fetched records are first saved in a journal on disk, so that no record is lost in a crash or in an outage of Kafka.
"""

import hashlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Event

import requests
import structlog

from services.producer.api import fetch
from services.producer.journal import Entry, Journal, open_journals
from services.producer.settings import ProducerSettings
from shared import health, metrics, service
from shared.dead_letters import SUFFIX, refusal
from shared.errors import Outage, Poison
from shared.flow import Flow
from shared.kafka import offsets
from shared.kafka.messages import Record
from shared.privacy import without_credentials
from shared.records import BadRow, NotJson, Transaction, encode_transaction, read_split
from shared.retry import OutageLog, delay_s, retry_outages
from shared.settings import kafka_properties
from shared.stream import delivery

log = structlog.get_logger()

_GROUP = "producer"
_API, _POLLING = "the payments API", "polling"  # the names shown on /ready and /live
_FETCH, _DELIVER = (metrics.STAGE.labels(stage) for stage in ("fetch", "deliver"))
_BATCH = 1000
_IDLE_S = 0.5
_TURN_S = 1.0
_MAX_DEAD_LETTER_BYTES = 512 * 1024  # a transaction has a few hundred bytes; by default, topics accept about 1 MB
_CLOCK_SLACK_MS = 600_000
_FORGOTTEN_S = 30.0  # every 10 s, brokers abort Kafka transactions that are older than 10 s


def serve(settings: ProducerSettings, shutdown: Event) -> None:
    """Poll until shutdown. Then write the remaining records of the journal to Kafka.

    Raises SettingsError if a setting is invalid.
    """
    properties = kafka_properties(settings)
    own, *left_behind = open_journals(settings.journal_directory, remembered=settings.recent_identities)
    polled, polling_ended = Event(), Event()
    with ThreadPoolExecutor(1 + len(left_behind), thread_name_prefix="writer") as workers:
        writing = [
            workers.submit(_write_left_behind, journal, properties, settings, shutdown) for journal in left_behind
        ]
        writing.append(
            workers.submit(
                write,
                own,
                properties,
                settings=settings,
                polled=polled,
                polling_ended=polling_ended,
                shutdown=shutdown,
            )
        )
        writing[-1].add_done_callback(lambda _: shutdown.set())  # if writing fails, polling stops as well
        try:
            poll(settings, own, polled, shutdown)
        except Outage as outage:
            log.error("fetched_records_lost", reason=str(outage))
        finally:
            shutdown.set()
            polling_ended.set()
            polled.set()
        for each in writing:
            try:
                each.result()
            except Outage as outage:
                log.warning("stopped_in_outage", reason=str(outage), left_for_later=own.count())
    own.close()


def poll(settings: ProducerSettings, journal: Journal, polled: Event, shutdown: Event) -> None:
    """Fetch records into the journal until shutdown. Set `polled` after each response that is JSON.

    Raises Outage if fetched records still cannot be saved to disk at shutdown.
    """
    flow = Flow("fetched")
    outage, full = OutageLog(_API), OutageLog("room in the journal")
    failures = 0
    api = f"payments API at {without_credentials(str(settings.api_url))}"
    health.waits_for(_API, "no response yet")
    with requests.Session() as session:
        while not shutdown.is_set():
            health.turned(_POLLING)
            flow.report_if_due()
            waiting = journal.count()
            metrics.WAITING.set(waiting)
            if waiting >= settings.max_waiting_records:
                full.failed(f"polling is paused, because {waiting} records wait to be written to Kafka")
                shutdown.wait(_TURN_S)
                continue
            full.over()
            due = time.monotonic() + settings.poll_interval_seconds
            try:
                with _FETCH.time():
                    body = fetch(session, str(settings.api_url), timeout_s=settings.api_timeout_seconds)
                rows = read_split(body)
            except (Outage, Poison) as problem:
                if isinstance(problem, Poison) and not isinstance(problem, NotJson):
                    _save(_dead_letters([BadRow(str(problem), body)], settings.topic_1), journal, settings, shutdown)
                    polled.set()
                retry_after_s = problem.retry_after_s if isinstance(problem, Outage) else 0.0
                backoff_s = delay_s(
                    failures, initial_s=settings.backoff_initial_seconds, max_s=settings.backoff_max_seconds
                )
                due = max(due, time.monotonic() + max(backoff_s, retry_after_s))
                failures += 1
                outage.failed(f"{api}: {problem}", retry_in_s=round(due - time.monotonic(), 1))
            else:
                outage.over()
                health.has(_API)
                failures = 0
                fetched = [*_records(rows.transactions, settings.topic_1), *_dead_letters(rows.bad, settings.topic_1)]
                fresh = _save(fetched, journal, settings, shutdown)
                polled.set()
                repeats = len(fetched) - fresh
                metrics.RECORDS_IN.inc(len(fetched))
                metrics.SKIPPED.inc(repeats)
                flow.add(records=len(fetched), fresh=fresh, repeats=repeats, refused=len(rows.bad))
            while (left_s := due - time.monotonic()) > 0 and not shutdown.is_set():
                health.turned(_POLLING)
                outage.remind()
                shutdown.wait(min(left_s, _TURN_S))
    health.ended(_POLLING)
    flow.report()


def write(
    journal: Journal,
    properties: dict[str, str],
    *,
    settings: ProducerSettings,
    polled: Event,
    polling_ended: Event,
    shutdown: Event,
) -> None:
    """Write the journal's records to their topics, in order, until polling has ended and no records are left.

    If Kafka is unreachable at shutdown, raises Outage, and leaves the records in the journal.
    """
    deliver = delivery.delivery(
        settings.delivery, properties=properties, transactional_id=f"producer-{journal.id}", shutdown=shutdown
    )
    forgotten = _ForgottenTransactions()
    outage = OutageLog(f"Kafka, for journal {journal.id[:8]}", waiting=journal.count)
    in_doubt = True  # an earlier process, or a delivery with an unknown result, may have written the records
    if left := journal.count():
        log.info("left_by_predecessor", records=left)

    def step() -> bool:
        nonlocal in_doubt
        if in_doubt:
            deliver.open()
            try:
                journal.written(_already_written(journal.waiting(), properties))
            except _OpenTransactions as open_transactions:
                deliver.release(forgotten.among(open_transactions.first_offsets))
                raise
        batch = journal.waiting(_BATCH)
        in_doubt = bool(batch)
        if batch:
            with _DELIVER.time():
                deliver.deliver([entry.record for entry in batch])
            journal.written(batch)
            in_doubt = False
            letters = sum(entry.record.topic.endswith(SUFFIX) for entry in batch)
            metrics.BATCH.observe(len(batch))
            metrics.DEAD_LETTERS.inc(letters)
            metrics.RECORDS_OUT.inc(len(batch) - letters)
        return bool(batch)

    try:
        while True:
            last = polling_ended.is_set()
            polled.clear()
            while retry_outages(
                step,
                shutdown=shutdown,
                initial_s=settings.backoff_initial_seconds,
                max_s=settings.backoff_max_seconds,
                outage_log=outage,
            ):
                pass
            if last:
                return
            polled.wait(_IDLE_S)
    finally:
        deliver.close()


def _write_left_behind(
    journal: Journal, properties: dict[str, str], settings: ProducerSettings, shutdown: Event
) -> None:
    """Write the records that are still in the journal of a replica that no longer runs."""
    polling_ended = Event()
    polling_ended.set()
    try:
        write(
            journal,
            properties,
            settings=settings,
            polled=Event(),
            polling_ended=polling_ended,
            shutdown=shutdown,
        )
    finally:
        journal.close()


def _records(transactions: Iterable[Transaction], topic: str) -> list[tuple[bytes, Record]]:
    """For each transaction, return its identity in the journal and its record for `topic`."""
    return [
        (f"{each.unix_time} {each.trans_num}".encode(), Record(topic, encode_transaction(each), each.key, []))
        for each in transactions
    ]


def _dead_letters(rows: Sequence[BadRow], topic: str) -> list[tuple[bytes, Record]]:
    """For each unreadable row, return its identity in the journal and its dead letter for `topic`."""
    records = []
    for row in rows:
        cut = (
            f" (only the first {_MAX_DEAD_LETTER_BYTES} bytes of the row are kept)"
            if len(row.value) > _MAX_DEAD_LETTER_BYTES
            else ""
        )
        log.warning("row_refused", reason=row.reason + cut)
        headers = refusal(topic, row.reason + cut, by="producer")
        record = Record(topic + SUFFIX, row.value[:_MAX_DEAD_LETTER_BYTES], None, headers)
        records.append((hashlib.sha256(row.value).digest(), record))
    return records


def _save(
    fetched: Sequence[tuple[bytes, Record]], journal: Journal, settings: ProducerSettings, shutdown: Event
) -> int:
    """Add records to the journal, waiting while its disk is full. Returns the number of new records.

    Raises Outage if the disk is still full at shutdown.
    """

    def add() -> int:
        health.turned(_POLLING)
        return journal.add(fetched)

    return retry_outages(
        add,
        shutdown=shutdown,
        initial_s=settings.backoff_initial_seconds,
        max_s=settings.backoff_max_seconds,
        outage_log=OutageLog("the journal's disk"),
    )


class _OpenTransactions(Outage):
    """Records cannot be read yet, because open Kafka transactions hide them.

    `first_offsets` has the (topic, partition, offset) at which each open Kafka transaction begins.
    """

    def __init__(self, first_offsets: Sequence[tuple[str, int, int]]) -> None:
        topics = sorted({topic for topic, _, _ in first_offsets})
        super().__init__(f"an open Kafka transaction on {' and '.join(topics)} hides the records after it")
        self.first_offsets = first_offsets


class _ForgottenTransactions:
    """Finds Kafka transactions that have been open for so long that neither producer nor broker will end them."""

    def __init__(self) -> None:
        self._first_seen: dict[tuple[str, int, int], float] = {}

    def among(self, first_offsets: Iterable[tuple[str, int, int]]) -> list[tuple[str, int]]:
        """Return the (topic, partition) of each forgotten transaction.

        `first_offsets` has the (topic, partition, offset) at which each open transaction begins.
        """
        now = time.monotonic()
        self._first_seen = {place: self._first_seen.get(place, now) for place in first_offsets}
        return [place[:2] for place, seen in self._first_seen.items() if now - seen > _FORGOTTEN_S]


def _already_written(entries: Sequence[Entry], properties: dict[str, str]) -> list[Entry]:
    """Return the entries that are already on their topics.

    Raises _OpenTransactions if open Kafka transactions hide records, and Outage if Kafka does not respond.
    """
    if not entries:
        return []
    since_ms = entries[0].fetched_ms - _CLOCK_SLACK_MS
    topics = sorted({entry.record.topic for entry in entries})
    starts = list(chain.from_iterable(offsets.since(properties, topic, since_ms) for topic in topics))
    written_ends = offsets.ends(properties, starts, committed=False)
    committed_ends = offsets.ends(properties, starts, committed=True)
    if hidden := [(*place, end) for place, end in committed_ends.items() if end < written_ends[place]]:
        raise _OpenTransactions(hidden)
    wanted = {(entry.record.topic, entry.record.value) for entry in entries}
    found = ((message.topic(), message.value()) for message in offsets.read_to_end(properties, starts, group=_GROUP))
    written = wanted.intersection(found)
    return [entry for entry in entries if (entry.record.topic, entry.record.value) in written]


if __name__ == "__main__":
    service.run("producer", ProducerSettings, serve)
