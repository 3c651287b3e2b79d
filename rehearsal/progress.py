"""Controls a demo's stream, shows what each service has done, and waits until all transactions are processed."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from confluent_kafka import KafkaException, TopicPartition
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from rehearsal.ledger import TopicReader
from sandbox.embedded import KEPT_RECORDS_A_PARTITION
from sandbox.mailbox import read_mail
from sandbox.payments_api import PaymentsApi
from sandbox.processes import Process, StandInError
from services.catalogue import CORE
from shared.errors import Outage
from shared.kafka import topics
from shared.kafka.clients import consumer

_TICK_S = 0.25
_STUCK_S = 60.0
_COMMITTED_WAIT_S = 2.0
_EMBEDDED_WINDOW = KEPT_RECORDS_A_PARTITION // 2


class GroupProgress:
    """The progress of a consumer group, measured by the group's committed offsets."""

    def __init__(self, properties: Mapping[str, str], name: str, topic: str, run_id: str) -> None:
        """Create a group for the service `name`, starting at the current end of the topic.

        Raises Outage if the broker is not available.
        """
        self.name = name
        self.id = f"{name}-{run_id}"
        starts = topics.ends(properties, [topic])
        self._starts = {(each.topic, each.partition): each.offset for each in starts}
        self._last = (0, 0)
        self._client = consumer(properties, group=self.id)
        if any(each.offset for each in starts):
            try:
                self._client.commit(offsets=starts, asynchronous=False)
            except KafkaException as error:
                raise Outage(f"consumer group {self.id}: {error.args[0].str()}") from None

    def close(self) -> None:
        """Close the client."""
        self._client.close()

    def done_and_lag(self, positions: Mapping[tuple[str, int], int]) -> tuple[int, int]:
        """Return the number of records committed since the start, and the lag behind `positions`.

        While the broker does not respond, returns the last known numbers.
        """
        wanted = [TopicPartition(topic, partition) for topic, partition in self._starts]
        try:
            committed = self._client.committed(wanted, timeout=_COMMITTED_WAIT_S)
        except KafkaException:
            return self._last
        done = lag = 0
        for each in committed:
            start = self._starts[each.topic, each.partition]
            reached = max(each.offset, start)  # the offset is negative before the first commit
            done += reached - start
            lag += max(0, positions.get((each.topic, each.partition), start) - reached)
        self._last = done, lag
        return self._last


class _Row(NamedTuple):
    """A row of the table that shows the services."""

    total: int = 0
    lag: int = 0
    rate: float = 0.0  # records per second


class Progress:
    """Controls the stream, shows what each service has done, and waits until all transactions are processed."""

    def __init__(
        self,
        api: PaymentsApi,
        reader: TopicReader,
        groups: list[GroupProgress],
        services: Mapping[str, Process],
        mail: Path,
        live: Live,
        *,
        hold: bool,
    ) -> None:
        """If `hold` is set, the stream waits for the slowest service, because the embedded broker keeps few records."""
        self._api, self._reader, self._groups, self._services = api, reader, groups, services
        self._mail, self._live, self._hold = mail, live, hold
        self._status: dict[str, Any] = {"served": 0, "in_flight": 0, "put_back": 0, "exhausted": False}
        self._rows = {name: _Row() for name in CORE}
        self._at = time.monotonic()
        self._newest_mail: Path | None = None
        self._last_alert = "none yet"

    def stream(self, interrupted: Event, steps: Iterator[None]) -> None:
        """Stream until all `steps` are done, then continue until the source is exhausted or `interrupted` is set."""
        over = object()
        while True:
            stepped = next(steps, over)
            if self._api.running:
                self._api.limit(self._slowest() + _EMBEDDED_WINDOW if self._hold else None)
            self._tick()
            if (interrupted.is_set() or self._status["exhausted"]) and stepped is over:
                break
            interrupted.wait(_TICK_S)
        for each in self._services.values():
            each.wait_ready()  # a service that was just restarted may not handle SIGTERM yet
        self._tick()
        self._api.limit(self._status["served"])

    def drain(self) -> None:
        """Wait until every service has processed all transactions, or until nothing has changed for a minute."""
        before, changed = None, time.monotonic()
        while time.monotonic() - changed < _STUCK_S:
            self._tick()
            served = self._status["served"]
            seen = self._reader.topics
            produced = len(seen.produced_ms)
            predicted = len(seen.visible_ms) + len(seen.dead["predictor"])
            lags = [row.lag for row in self._rows.values()]
            unconfirmed = self._status["in_flight"] + self._status["put_back"]  # a producer will fetch these rows
            if not unconfirmed and not any(lags) and self._all_predicted():
                return
            if (now := (unconfirmed, served, produced, predicted, lags)) != before:
                before, changed = now, time.monotonic()
            time.sleep(_TICK_S)

    def _all_predicted(self) -> bool:
        """Whether every transaction that was served is on topic_1, and every one on topic_1 is predicted or dead."""
        seen = self._reader.topics
        produced = seen.produced_ms.keys()
        if len(self._api.identities() - produced) > seen.refused_rows:
            return False
        return not produced - seen.visible_ms.keys() - seen.dead["predictor"]

    def _slowest(self) -> int:
        return min(group.done_and_lag({})[0] for group in self._groups)

    def _tick(self) -> None:
        """Update the figures and the display. Raises StandInError if a service has exited."""
        for name, each in self._services.items():
            if not each.running:
                raise StandInError(f"{name} exited unexpectedly: {each.last_line()}")
        now = time.monotonic()
        if self._api.running:
            self._status = self._api.status()
        served = self._status["served"]
        produced = self._reader.topics.records_1
        mails = sorted(self._mail.glob("*.eml"))
        figures = {"producer": (produced, max(0, served - produced))}
        for group in self._groups:
            figures[group.name] = group.done_and_lag(self._reader.positions)
        figures["alerter"] = (len(mails), figures["alerter"][1])
        figures["db_sink"] = (self._reader.topics.records_2 - figures["db_sink"][1], figures["db_sink"][1])
        figures["predictor"] = (self._reader.topics.records_2, figures["predictor"][1])
        for name, (total, lag) in figures.items():
            rate = (total - self._rows[name].total) / max(now - self._at, 0.01)
            self._rows[name] = _Row(total, lag, rate)
        self._at = now
        if mails and mails[-1] != self._newest_mail:
            self._newest_mail = mails[-1]
            self._last_alert = str(read_mail(mails[-1]).message["Subject"])
        self._live.update(self._table(served))

    def _table(self, served: int) -> Group:
        table = Table(title=f"{served:,} transactions served")
        for heading in ("service", "per second", "total", "lag"):
            table.add_column(heading, justify="left" if heading == "service" else "right")
        for name, row in self._rows.items():
            table.add_row(name, f"{row.rate:,.0f}", f"{row.total:,}", f"{row.lag:,}")
        return Group(table, f"last alert: {escape(self._last_alert)}")
