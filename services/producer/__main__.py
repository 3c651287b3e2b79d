"""The producer: polls the payments API and writes the transactions to topic_1.

Fetched records are first saved in a journal on disk, so that no record is lost in a crash or in an outage of Kafka.
"""

import hashlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Event

import structlog

from services.producer.api import fetch
from services.producer.journal import Entry, Journal, open_journals
from services.producer.settings import ProducerSettings
from shared import health, metrics, service
from shared.dead_letters import SUFFIX, fit, refusal
from shared.errors import Outage, Poison
from shared.flow import Flow
from shared.http import Answer, Client
from shared.kafka import offsets
from shared.kafka.messages import Record
from shared.privacy import without_credentials
from shared.records import BadRow, NotJson, Transaction, encode_transaction, read_slices
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
_MOST_LETTERS = 100  # per response; further rows that cannot be read share dead letters
_KEPT_BYTES = 64 * 1024  # of a response that is no JSON
_MOST_NAMES_BYTES = 4096
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
    url = str(settings.api_url)
    api = f"payments API at {without_credentials(url)}"
    health.waits_for(_API, "no response yet")
    with Client() as client:
        while not shutdown.is_set():
            flow.report_if_due()
            _wait_for_room(journal, settings, full, shutdown)
            due = time.monotonic() + settings.poll_interval_seconds
            try:
                with _FETCH.time():
                    answer = fetch(
                        client, url, timeout_s=settings.api_timeout_seconds, most_bytes=settings.api_max_bytes
                    )
                _take(answer, journal, settings, flow=flow, full=full, polled=polled, shutdown=shutdown)
            except (Outage, Poison) as problem:
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
            while (left_s := due - time.monotonic()) > 0 and not shutdown.is_set():
                health.turned(_POLLING)
                outage.remind()
                shutdown.wait(min(left_s, _TURN_S))
    health.ended(_POLLING)
    flow.report()


def _wait_for_room(journal: Journal, settings: ProducerSettings, full: OutageLog, shutdown: Event) -> None:
    """Wait while too many records are waiting in the journal, or until shutdown."""
    while True:
        health.turned(_POLLING)
        waiting = journal.count()
        metrics.WAITING.set(waiting)
        if waiting < settings.max_waiting_records or shutdown.is_set():
            full.over()
            return
        full.failed(f"polling is paused, because {waiting} records wait to be written to Kafka")
        shutdown.wait(_TURN_S)


def _take(
    answer: Answer,
    journal: Journal,
    settings: ProducerSettings,
    *,
    flow: Flow,
    full: OutageLog,
    polled: Event,
    shutdown: Event,
) -> None:
    """Save what a response contains, a thousand rows at a time. Set `polled` after each time.

    Raises Poison if the response contains no rows. The response is then saved as a dead letter. Raises Outage if a
    record still cannot be saved to disk at shutdown.
    """
    topic = settings.topic_1
    refused = 0
    try:
        for rows in read_slices(answer.body):
            bad = _dead_letters(rows.bad, topic, most=max(0, _MOST_LETTERS - refused))
            fetched = [*_records(rows.transactions, topic), *bad]
            fresh = _save(fetched, journal, settings, shutdown)
            polled.set()
            if rows.bad and not refused:
                log.warning(
                    "rows_refused", first_reason=rows.bad[0].reason, rows_of_slice=sum(each.rows for each in rows.bad)
                )
            refused += sum(each.rows for each in rows.bad)
            repeats = len(fetched) - fresh
            metrics.RECORDS_IN.inc(len(fetched))
            metrics.SKIPPED.inc(repeats)
            flow.add(records=len(fetched), fresh=fresh, repeats=repeats, refused=sum(each.rows for each in rows.bad))
            _wait_for_room(journal, settings, full, shutdown)
    except Poison as poison:
        kept = answer.body[:_KEPT_BYTES] if isinstance(poison, NotJson) else answer.body
        _save([_letter(kept, topic, str(poison), answer=answer)], journal, settings, shutdown)
        polled.set()
        raise
    if answer.cut:
        log.warning("response_cut", bytes=len(answer.body), hint="the rest was not read; raise API_MAX_BYTES")


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


def _dead_letters(rows: Sequence[BadRow], topic: str, *, most: int) -> list[tuple[bytes, Record]]:
    """For each unreadable row, return its identity in the journal and its dead letter for `topic`.

    If there are more than `most` rows, the others share a dead letter.
    """
    letters = [_letter(row.value, topic, row.reason) for row in rows[:most]]
    if others := rows[most:]:
        together = BadRow("", others[0].columns, b",".join(row.text for row in others))
        reason = f"{sum(row.rows for row in others)} values are no transactions. The first: {others[0].reason}"
        letters.append(_letter(together.value, topic, reason))
    return letters


def _letter(value: bytes, topic: str, reason: str, *, answer: Answer | None = None) -> tuple[bytes, Record]:
    """Return a dead letter for `topic`, and its identity in the journal. Of a response, also keep what came with it."""
    headers = refusal(topic, reason, by="producer")
    if answer:
        headers += [
            ("dlq-http-status", str(answer.status).encode()),
            ("dlq-http-headers", ", ".join(answer.headers).encode(errors="replace")[:_MOST_NAMES_BYTES]),
        ]
    return hashlib.sha256(value).digest(), fit(Record(topic + SUFFIX, value, None, headers))


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
