"""The demo: the local stack, the four services on it, a stream of transactions, and a ledger that must balance."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from confluent_kafka import KafkaException, TopicPartition
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from rehearsal.ledger import Ledger, TopicReader, Topics, draw_up
from rehearsal.stack import SENDER, Stack, local_stack, service
from sandbox.embedded import KEPT_RECORDS_A_PARTITION, EmbeddedBroker
from sandbox.mailbox import read_mail
from sandbox.payments_api import PaymentsApi
from sandbox.processes import Process, StandInError
from services import catalogue
from services.db_sink.table import connect, reason
from shared.dead_letters import SUFFIX
from shared.errors import Outage, SettingsError
from shared.kafka import topics
from shared.kafka.clients import consumer

TOPICS = ("topic_1", "topic_2")
_TICK_S = 0.25
_STUCK_S = 60.0
_PROGRESS_WAIT_S = 2.0
_SHOWN = 10
_EMBEDDED_WINDOW = KEPT_RECORDS_A_PARTITION // 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the demo was asked to do."""

    transactions: int | None
    rate: float
    source: Path | None
    fraud_rate: float
    broker: str
    database: str | None
    work_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)  # of the services, laid over that of the stack
    confirmed: bool = False  # what a client may not have received is served again


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a scenario plays with."""

    stack: Stack
    services: dict[str, Process]  # that have to run
    topics: Topics  # what was read back so far
    enough: Event  # set, it ends the stream
    _directory: Path
    _environment: Mapping[str, str]

    def replica(self, name: str, number: int) -> Process:
        """Another process of the service, not started yet."""
        return service(name, self._directory, self._environment, replica=number)


Scenario = Callable[[Scene], Iterator[None]]
"""What happens meanwhile: it goes on to its next `yield` four times a second, the first time before the services start,
and the demo does not end before it has."""


def _calm(_scene: Scene) -> Iterator[None]:
    yield


def run(options: Options, console: Console, *, scenario: Scenario = _calm) -> Ledger:
    """Run the demo to its end and draw up the ledger. Raises StandInError, Outage or SettingsError."""
    if options.database:
        _check_database(options.database)
    began = time.monotonic()
    since_ms = time.time_ns() // 1_000_000
    interrupted = Event()
    with ExitStack() as stack:
        stack.enter_context(_interrupts(interrupted))
        parts = stack.enter_context(
            local_stack(
                options.work_dir,
                broker=options.broker,
                api_options=_api_options(options),
                database_url=options.database,
            )
        )
        embedded = isinstance(parts.broker, EmbeddedBroker)
        (topics.use if embedded else topics.create)(parts.properties, TOPICS)
        console.print(f"local stack and model ready after {time.monotonic() - began:.0f} s")
        run_id = f"demo-{since_ms}"  # somebody else's broker may have groups of the services' own names
        groups = [
            _Group(parts.properties, reader.name, group.topic, run_id)
            for reader, group in catalogue.readers()
            if group.only_with != "webhook_url"
        ]
        for group in groups:
            stack.callback(group.close)
        reader = TopicReader(parts.properties, topic_1=TOPICS[0])
        reader.start(topics.ends(parts.properties, [name + suffix for name in TOPICS for suffix in ("", SUFFIX)]))
        environment = parts.addresses.environment() | {"REPLICA": run_id}
        environment |= {f"{group.name.upper()}_GROUP": group.id for group in groups}
        environment |= {"JOURNAL_DIRECTORY": str(options.work_dir / "journal" / run_id), **options.environment}
        services = {name: service(name, options.work_dir, environment) for name in catalogue.CORE}
        stack.callback(lambda: [each.stop() for each in services.values()])
        scene = Scene(
            stack=parts,
            services=services,
            topics=reader.topics,
            enough=interrupted,
            _directory=options.work_dir,
            _environment=environment,
        )
        steps = scenario(scene)
        next(steps)
        for each in services.values():
            each.spawn()
        for each in services.values():
            each.wait_ready()
        console.print(f"the four services are ready after {time.monotonic() - began:.0f} s")
        with Live(console=console, refresh_per_second=4) as live:
            pump = _Pump(parts.api, reader, groups, services, options.work_dir / "mail", live, hold=embedded)
            pump.stream(interrupted, steps)
            pump.drain()
        console.print()
        for name, each in services.items():
            if code := each.stop():
                raise StandInError(f"{name} did not stop as it should, but with exit code {code}: {each.last_line()}")
        status = parts.api.status()
        return draw_up(
            reader.stop(),
            served=parts.api.identities(),
            repeats=status["repeats"],
            mailbox=options.work_dir / "mail",
            since_ms=since_ms,
            sender=SENDER,
            engine=connect(parts.addresses.database_url),
            seconds=time.monotonic() - began,
        )


def show(ledger: Ledger, console: Console) -> None:
    """Print the ledger as a table, with its verdict."""
    table = Table(title="Ledger", show_header=False)
    figures = ledger.report()
    for name in (
        "served", "fetched", "skipped_repeats", "topic_1", "topic_2", "predicted_frauds", "emails", "mailed_frauds",
        "rows", "repeated_mails", "dead_letters", "lost", "duplicates", "out_of_order", "seconds",
    ):  # fmt: skip
        table.add_row(name.replace("_", " "), f"{figures[name]:,}", end_section=name in ("skipped_repeats", "rows"))
    for name, spans in ledger.latency_ms.items():
        both = " / ".join("-" if value is None else f"{value:,.0f}" for value in spans.values())
        table.add_row(f"{name.replace('_', ' ')}, ms (p50 / p99)", both)
    console.print(table)
    if ledger.balanced:
        console.print("[bold green]The ledger balances: nothing lost, nothing doubled, every fraud mailed.")
    else:
        console.print("[bold red]The ledger does not balance.")
        for what, identities in ledger.suspects.items():
            some = ", ".join(f"{trans_num} at {unix_time}" for trans_num, unix_time in identities[:_SHOWN])
            console.print(f"  {what}: {len(identities)}: {some}", soft_wrap=True)


class _Group:
    """How far a consumer group has come, seen from outside."""

    def __init__(self, properties: Mapping[str, str], name: str, topic: str, run_id: str) -> None:
        """Make the group, which begins at the topic's present end. Raises Outage."""
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
        """Stop watching."""
        self._client.close()

    def progress(self, positions: Mapping[tuple[str, int], int]) -> tuple[int, int]:
        """Records of its topic that it has committed since the start, and those before `positions` that it has not.

        While the broker does not answer, what it was before.
        """
        wanted = [TopicPartition(topic, partition) for topic, partition in self._starts]
        try:
            committed = self._client.committed(wanted, timeout=_PROGRESS_WAIT_S)
        except KafkaException:
            return self._last
        done = waiting = 0
        for each in committed:
            start = self._starts[each.topic, each.partition]
            passed = max(each.offset, start)  # no commit yet is a negative number
            done += passed - start
            waiting += max(0, positions.get((each.topic, each.partition), start) - passed)
        self._last = done, waiting
        return self._last


@dataclass(kw_only=True)
class _Row:
    total: int = 0
    rate: float = 0.0
    lag: int = 0


class _Pump:
    """Lets the source flow, shows how far everything is, and knows when all of it has arrived."""

    def __init__(
        self,
        api: PaymentsApi,
        reader: TopicReader,
        groups: list[_Group],
        services: Mapping[str, Process],
        mail: Path,
        live: Live,
        *,
        hold: bool,
    ) -> None:
        self._api, self._reader, self._groups, self._services = api, reader, groups, services
        self._mail, self._live, self._hold = mail, live, hold
        self._status: dict[str, Any] = {"served": 0, "in_flight": 0, "put_back": 0, "exhausted": False}
        self._rows = {name: _Row() for name in catalogue.CORE}
        self._at = time.monotonic()
        self._newest: Path | None = None
        self._last_alert = "none yet"

    def stream(self, interrupted: Event, steps: Iterator[None]) -> None:
        """Let the source flow until it is exhausted, or somebody interrupts, and the scenario is over."""
        over = object()
        while True:
            acted = next(steps, over)
            if self._api.running:
                self._api.limit(self._slowest() + _EMBEDDED_WINDOW if self._hold else None)
            self._tick()
            if (interrupted.is_set() or self._status["exhausted"]) and acted is over:
                break
            interrupted.wait(_TICK_S)
        for each in self._services.values():
            each.wait_ready()  # one just started anew could not yet be told to stop
        self._tick()
        self._api.limit(self._status["served"])

    def drain(self) -> None:
        """Wait until everything served has arrived everywhere, or nothing has moved for a minute."""
        before, moved = None, time.monotonic()
        while time.monotonic() - moved < _STUCK_S:
            self._tick()
            served = self._status["served"]
            seen = self._reader.topics
            produced = len(seen.produced_ms) + seen.refused_rows
            predicted = len(seen.visible_ms.keys() | seen.dead) + seen.refused_rows
            lags = [row.lag for row in self._rows.values()]
            unsure = self._status["in_flight"] + self._status["put_back"]  # a producer asks for them, by and by
            if not unsure and served <= produced <= predicted and not any(lags):
                return
            if (now := (unsure, served, produced, predicted, lags)) != before:
                before, moved = now, time.monotonic()
            time.sleep(_TICK_S)

    def _slowest(self) -> int:
        return min(group.progress({})[0] for group in self._groups)

    def _tick(self) -> None:
        for name, each in self._services.items():
            if not each.running:
                raise StandInError(f"{name} ended: {each.last_line()}")
        now = time.monotonic()
        if self._api.running:
            self._status = self._api.status()
        served = self._status["served"]
        produced = self._reader.topics.records_1
        mails = sorted(self._mail.glob("*.eml"))
        figures = {"producer": (produced, max(0, served - produced))}
        for group in self._groups:
            figures[group.name] = group.progress(self._reader.positions)
        figures["alerter"] = (len(mails), figures["alerter"][1])
        figures["db_sink"] = (self._reader.topics.records_2 - figures["db_sink"][1], figures["db_sink"][1])
        figures["predictor"] = (self._reader.topics.records_2, figures["predictor"][1])
        for name, (total, lag) in figures.items():
            rate = (total - self._rows[name].total) / max(now - self._at, 0.01)
            self._rows[name] = _Row(total=total, lag=lag, rate=rate)
        self._at = now
        if mails and mails[-1] != self._newest:
            self._newest = mails[-1]
            self._last_alert = str(read_mail(mails[-1]).message["Subject"])
        self._live.update(self._picture(served))

    def _picture(self, served: int) -> Group:
        table = Table(title=f"{served:,} transactions served")
        for heading in ("service", "per second", "total", "lag"):
            table.add_column(heading, justify="left" if heading == "service" else "right")
        for name, row in self._rows.items():
            table.add_row(name, f"{row.rate:,.0f}", f"{row.total:,}", f"{row.lag:,}")
        return Group(table, f"last alert: {escape(self._last_alert)}")


def _api_options(options: Options) -> tuple[str, ...]:
    chosen = ["--held", "--rate", str(options.rate), "--fraud-rate", str(options.fraud_rate), "--seed", "1"]
    if options.confirmed:
        chosen.append("--confirmed")
    if options.transactions is not None:
        chosen += ["--transactions", str(options.transactions)]
    if options.source:
        chosen += ["--source", str(options.source.resolve())]
    return tuple(chosen)


def _check_database(url: str) -> None:
    try:
        connect(url).connect().close()
    except ValueError as error:
        raise SettingsError(f"--database: {error}") from None
    except SQLAlchemyError as error:
        raise SettingsError(f"--database: {reason(error)}") from None


@contextmanager
def _interrupts(interrupted: Event) -> Iterator[None]:
    """The first Ctrl+C or SIGTERM ends the stream, the second the demo."""

    def interrupt(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
