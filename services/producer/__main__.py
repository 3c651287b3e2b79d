"""The producer: polls the payments API into topic_1, by way of a journal on disk."""

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
from shared.records import BadRow, NotJson, Transaction, encode_transaction, read_split
from shared.retry import OutageLog, delay_s, retry_outages
from shared.settings import kafka_properties
from shared.stream import delivery

log = structlog.get_logger()

_GROUP = "producer"
_API, _POLLING = "the payments API", "polling"  # as /ready and /live call them
_FETCH, _DELIVER = (metrics.STAGE.labels(stage) for stage in ("fetch", "deliver"))
_BATCH = 1000
_IDLE_S = 0.5
_TURN_S = 1.0
_LARGEST_REFUSED = 512 * 1024  # bytes; a transaction has a few hundred, and no topic takes much more than this
_CLOCK_SLACK_MS = 600_000
_FORGOTTEN_S = 30.0  # the broker ends what is older than ten, and looks for it every ten


def serve(settings: ProducerSettings, shutdown: Event) -> None:
    """Poll until shutdown, then write what waits."""
    properties = kafka_properties(settings)
    own, *left_behind = open_journals(settings.journal_directory, remembered=settings.recent_identities)
    polled, over = Event(), Event()
    with ThreadPoolExecutor(1 + len(left_behind), thread_name_prefix="writer") as workers:
        writing = [workers.submit(_write_out, journal, properties, settings, shutdown) for journal in left_behind]
        writing.append(
            workers.submit(write, own, properties, settings=settings, polled=polled, over=over, shutdown=shutdown)
        )
        writing[-1].add_done_callback(lambda _: shutdown.set())  # whatever ends it ends the polling
        try:
            poll(settings, own, polled, shutdown)
        except Outage as outage:
            log.error("fetched_and_not_kept", reason=str(outage))
        finally:
            shutdown.set()
            over.set()
            polled.set()
        for each in writing:
            try:
                each.result()
            except Outage as outage:
                log.warning("stopped_in_outage", reason=str(outage), left_for_later=own.count())
    own.close()


def poll(settings: ProducerSettings, journal: Journal, polled: Event, shutdown: Event) -> None:
    """Fetch into the journal until shutdown; `polled` is set whenever something came."""
    flow = Flow("fetched")
    outage, full = OutageLog(_API), OutageLog("room in the journal")
    failures = 0
    health.waits_for(_API, "no answer yet")
    with requests.Session() as session:
        while not shutdown.is_set():
            health.turned(_POLLING)
            flow.report_if_due()
            waiting = journal.count()
            metrics.WAITING.set(waiting)
            if waiting >= settings.max_waiting_records:
                full.failed(f"{waiting} records wait to be written")
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
                    _keep(_dead_letters([BadRow(str(problem), body)], settings.topic_1), journal, settings, shutdown)
                    polled.set()
                asked_s = problem.retry_after_s if isinstance(problem, Outage) else 0.0
                backoff_s = delay_s(
                    failures, initial_s=settings.backoff_initial_seconds, max_s=settings.backoff_max_seconds
                )
                due = max(due, time.monotonic() + max(backoff_s, asked_s))
                failures += 1
                outage.failed(str(problem), retry_in_s=round(due - time.monotonic(), 1))
            else:
                outage.over()
                health.has(_API)
                failures = 0
                fetched = [*_records(rows.transactions, settings.topic_1), *_dead_letters(rows.bad, settings.topic_1)]
                fresh = _keep(fetched, journal, settings, shutdown)
                polled.set()
                repeats = len(fetched) - fresh
                metrics.RECORDS_IN.inc(len(fetched))
                metrics.SKIPPED.inc(repeats)
                flow.add(records=len(fetched), fresh=fresh, repeats=repeats, refused=len(rows.bad))
            while (rest_s := due - time.monotonic()) > 0 and not shutdown.is_set():
                health.turned(_POLLING)
                outage.remind()
                shutdown.wait(min(rest_s, _TURN_S))
    health.ended(_POLLING)
    flow.report()


def write(
    journal: Journal,
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
    deliver = delivery.delivery(
        settings.delivery, properties=properties, transactional_id=f"producer-{journal.id}", shutdown=shutdown
    )
    forgotten = _Forgotten()
    outage = OutageLog(f"Kafka, for journal {journal.id[:8]}", waiting=journal.count)
    in_doubt = True  # perhaps what waits was written by a predecessor, or by a try whose answer was lost
    if left := journal.count():
        log.info("left_by_predecessor", records=left)

    def step() -> bool:
        nonlocal in_doubt
        if in_doubt:
            deliver.open()
            try:
                journal.written(_on_topics(journal.waiting(), properties))
            except _Hidden as hidden:
                deliver.release(forgotten.among(hidden.behind))
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
            last = over.is_set()
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


def _write_out(journal: Journal, properties: dict[str, str], settings: ProducerSettings, shutdown: Event) -> None:
    """Bring what a replica that is gone has left onto its topics."""
    over = Event()
    over.set()
    try:
        write(journal, properties, settings=settings, polled=Event(), over=over, shutdown=shutdown)
    finally:
        journal.close()


def _records(transactions: Iterable[Transaction], topic: str) -> list[tuple[bytes, Record]]:
    """The records with what makes each known."""
    return [
        (f"{each.unix_time} {each.trans_num}".encode(), Record(topic, encode_transaction(each), each.key, []))
        for each in transactions
    ]


def _dead_letters(rows: Sequence[BadRow], topic: str) -> list[tuple[bytes, Record]]:
    """The rows that could not be read, as records for the dead letters of `topic`."""
    records = []
    for row in rows:
        cut = f" (kept up to {_LARGEST_REFUSED} bytes)" if len(row.value) > _LARGEST_REFUSED else ""
        log.warning("row_refused", reason=row.reason + cut)
        headers = refusal(topic, row.reason + cut, by="producer")
        record = Record(topic + SUFFIX, row.value[:_LARGEST_REFUSED], None, headers)
        records.append((hashlib.sha256(row.value).digest(), record))
    return records


def _keep(
    fetched: Sequence[tuple[bytes, Record]], journal: Journal, settings: ProducerSettings, shutdown: Event
) -> int:
    """Into the journal, however long its disk is full: what was fetched is not let go. Returns how many are new."""

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


class _Hidden(Outage):
    """Transactions are open, `behind` which (topic, partition, offset) nothing can be seen."""

    def __init__(self, behind: Sequence[tuple[str, int, int]]) -> None:
        topics = sorted({topic for topic, _, _ in behind})
        super().__init__(f"a transaction is open on {' and '.join(topics)}, behind which nothing can be seen")
        self.behind = behind


class _Forgotten:
    """Tells transactions that nobody will end from those that are under way."""

    def __init__(self) -> None:
        self._first_seen: dict[tuple[str, int, int], float] = {}

    def among(self, behind: Iterable[tuple[str, int, int]]) -> list[tuple[str, int]]:
        """The partitions where one has been open for longer than the broker lets any live."""
        now = time.monotonic()
        self._first_seen = {place: self._first_seen.get(place, now) for place in behind}
        return [place[:2] for place, seen in self._first_seen.items() if now - seen > _FORGOTTEN_S]


def _on_topics(entries: Sequence[Entry], properties: dict[str, str]) -> list[Entry]:
    """Those that lie on their topics already. Raises Outage."""
    if not entries:
        return []
    since_ms = entries[0].fetched_ms - _CLOCK_SLACK_MS
    topics = sorted({entry.record.topic for entry in entries})
    starts = list(chain.from_iterable(offsets.since(properties, topic, since_ms) for topic in topics))
    written_ends = offsets.ends(properties, starts, committed=False)
    committed_ends = offsets.ends(properties, starts, committed=True)
    if hidden := [(*place, end) for place, end in committed_ends.items() if end < written_ends[place]]:
        raise _Hidden(hidden)
    wanted = {(entry.record.topic, entry.record.value) for entry in entries}
    there = ((message.topic(), message.value()) for message in offsets.read_to_end(properties, starts, group=_GROUP))
    written = wanted.intersection(there)
    return [entry for entry in entries if (entry.record.topic, entry.record.value) in written]


if __name__ == "__main__":
    service.run("producer", ProducerSettings, serve)
