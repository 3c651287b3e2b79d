"""The demo: start the local stack and the services, stream transactions through them, and check the ledger."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from rich.console import Console
from rich.live import Live
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from rehearsal.ledger import Ledger, TopicReader, Topics, draw_up
from rehearsal.progress import GroupProgress, Progress
from rehearsal.stack import SENDER, Stack, local_stack, service
from sandbox.embedded import EmbeddedBroker
from sandbox.processes import Process, StandInError
from services import catalogue
from services.db_sink.table import connect, reason
from shared.dead_letters import SUFFIX
from shared.errors import SettingsError
from shared.kafka import topics

TOPICS = ("topic_1", "topic_2")
_SHOWN = 10
_POLL_INTERVAL_S = "0.05"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run the demo.

    If `transactions` is None, the stream runs until interrupted. If `source` is None, transactions are generated.
    """

    transactions: int | None
    rate: float
    source: Path | None
    fraud_rate: float
    broker: str
    database: str | None
    work_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)  # added to the services' environment
    confirmed: bool = False  # whether the payments API repeats rows whose receipt was not confirmed


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The parts of the running demo that a scenario can use."""

    stack: Stack
    services: dict[str, Process]  # by name; the demo fails if a service exits unexpectedly
    topics: Topics  # the records that the ledger has read so far
    enough: Event  # when set, ends the stream
    _directory: Path
    _environment: Mapping[str, str]

    def replica(self, name: str, number: int) -> Process:
        """Create another replica of the service, without starting the replica."""
        return service(name, self._directory, self._environment, replica=number)


Scenario = Callable[[Scene], Iterator[None]]
"""A function whose generator acts on the demo while transactions stream.

The generator is advanced to its first `yield` before the services start, and then four times per second. The demo
continues at least until the generator is exhausted.
"""


def _no_faults(_scene: Scene) -> Iterator[None]:
    yield


def run(options: Options, console: Console, *, scenario: Scenario = _no_faults) -> Ledger:
    """Run the demo to its end and return the ledger.

    Raises StandInError if a process fails, Outage if Kafka does not respond, and SettingsError for invalid settings.
    """
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
        run_id = f"demo-{since_ms}"  # an existing broker may already have groups with the default names
        groups = [
            GroupProgress(parts.properties, reader.name, group.topic, run_id)
            for reader, group in catalogue.readers()
            if group.only_with != "webhook_url"
        ]
        for group in groups:
            stack.callback(group.close)
        reader = TopicReader(parts.properties, topic_1=TOPICS[0])
        reader.start(topics.ends(parts.properties, [name + suffix for name in TOPICS for suffix in ("", SUFFIX)]))
        environment = parts.addresses.environment() | {"REPLICA": run_id}
        environment |= {f"{group.name.upper()}_GROUP": group.id for group in groups}
        environment["POLL_INTERVAL_SECONDS"] = (
            _POLL_INTERVAL_S  # without a pause, each poll would return only one or two rows
        )
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
        console.print(f"services ready after {time.monotonic() - began:.0f} s")
        with Live(console=console, refresh_per_second=4) as live:
            progress = Progress(parts.api, reader, groups, services, options.work_dir / "mail", live, hold=embedded)
            progress.stream(interrupted, steps)
            progress.drain()
        console.print()
        for name, each in services.items():
            if code := each.stop():
                raise StandInError(f"{name} exited with {code} after SIGTERM: {each.last_line()}")
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
    """Print the ledger as a table, and say whether the ledger balances."""
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
        console.print("[bold green]The ledger balances: nothing lost, nothing duplicated, every fraud mailed.")
    else:
        console.print("[bold red]The ledger does not balance.")
        for what, identities in ledger.suspects.items():
            some = ", ".join(f"{trans_num} at {unix_time}" for trans_num, unix_time in identities[:_SHOWN])
            console.print(f"  {what}: {len(identities)}: {some}", soft_wrap=True)


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
    """On the first Ctrl+C or SIGTERM, set the event, which ends the stream. On the second signal, abort the demo."""

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
