"""Fault campaigns: the whole flow on a real Apache Kafka while its parts are killed, stopped and made to misbehave.

Each scenario streams at a steady rate, injects its faults by seed, mends everything, drains, and draws up the ledger.
What was promised must then hold, by identity.
"""

import json
import logging
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import cast

import msgspec
import psycopg2
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rehearsal import demo
from rehearsal.demo import Options, Scene
from rehearsal.ledger import Ledger, Place
from sandbox.apache import ApacheKafka
from sandbox.mailbox import messages
from sandbox.payments_api import FAULTS
from sandbox.postgres import Postgres
from sandbox.processes import Process, python
from services.catalogue import CORE
from shared.kafka.messages import coordinates
from shared.records import REFERENCE

RATE = 250.0  # transactions a second
_FRAUD_RATE = 0.02
_POISON_SHARE = 0.005
_TICK_S = 0.25
_SHOWN = 10
_OUTAGE_S = 60.0
_STOP_S = 10.0  # `docker stop` gives a container as long
_LONGEST_ADDED_DELAY_MS = 250.0
_TWO_RECIPIENTS = {"ALERT_TO": "gone@fraud-alarm.example,analyst@fraud-alarm.example"}
_IMPATIENT = {"SMTP_TIMEOUT_SECONDS": "2"}


@dataclass(kw_only=True)
class Run:
    """One run of a scenario: what it plays with, and the account of what was done."""

    scene: Scene
    broker: ApacheKafka
    database: Postgres
    dice: random.Random
    ends: float  # monotonic
    least_kills: int
    work_dir: Path
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    stubborn: list[str] = field(default_factory=list)  # did not exit with 0, or not in time, when asked to
    rubbish: set[Place] = field(default_factory=set)
    mended: str | None = None
    figures: dict[str, int] = field(default_factory=dict)
    away_ms: list[tuple[float, float]] = field(default_factory=list)  # when the database was, epoch

    @property
    def over(self) -> bool:
        """True when no more faults are to come."""
        done = time.monotonic() >= self.ends and self.kills.total() >= self.least_kills
        return done or self.scene.enough.is_set()

    def kill(self, process: Process) -> None:
        """SIGKILL."""
        process.kill()
        self.kills[process.name.partition("-")[0]] += 1

    def passing(self, least_s: float, most_s: float | None = None) -> Iterator[None]:
        """Let a time between the two pass, and no more than is left of the run."""
        until = time.monotonic() + self.dice.uniform(least_s, least_s if most_s is None else most_s)
        while time.monotonic() < until and not self.over:
            yield


Faults = Callable[[Run], Iterator[None]]
"""Injects until the run is over, then mends what it broke. It goes on to its next `yield` four times a second."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Faults, how long they last, and what must hold besides the ledger."""

    faults: Faults
    minutes: float = 2.0
    least_kills: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    broken: Callable[[Run, Ledger], list[str]] = lambda _run, _ledger: []


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a scenario."""

    scenario: str
    seed: int
    ledger: Ledger
    kills: Mapping[str, int]
    faults: Mapping[str, int]
    rubbish: int
    evictions: int
    figures: Mapping[str, int]
    broken: Sequence[str]

    def report(self) -> dict[str, object]:
        """As it goes into the report file."""
        named = {
            name: getattr(self, name) for name in ("scenario", "seed", "rubbish", "evictions", "figures", "broken")
        }
        return named | {"kills": dict(self.kills), "faults": dict(self.faults)} | self.ledger.report()


# ---- faults ---------------------------------------------------------------------------------------------------------


def kills(name: str, *, pause_s: float = 3.0) -> Faults:
    """SIGKILL at random moments, some while it is starting, and a restart at once."""

    def faults(run: Run) -> Iterator[None]:
        while not run.over:
            process = run.scene.services[name]
            if run.dice.random() < 0.8:
                while not run.over and not process.ready:
                    yield
            yield from run.passing(0.0, pause_s)
            time.sleep(run.dice.uniform(0, _TICK_S))
            if run.over:
                break
            run.kill(process)
            process.spawn()
            yield

    return faults


def stops(*, pause_s: float = 3.0) -> Faults:
    """SIGTERM at random moments, to one service after the other, and a restart at once."""

    def faults(run: Run) -> Iterator[None]:
        order: list[str] = []
        while not run.over:
            order = order or run.dice.sample(CORE, len(CORE))
            process = run.scene.services[order.pop()]
            while not run.over and not process.ready:
                yield
            yield from run.passing(0.0, pause_s)
            time.sleep(run.dice.uniform(0, _TICK_S))
            if run.over:
                break
            if process.stop(timeout_s=_STOP_S):
                run.stubborn.append(process.name)
            run.faults[f"{process.name} stopped"] += 1
            process.spawn()
            yield

    return faults


def scaling(*, pause_s: float = 8.0) -> Faults:
    """Predictors from one to three and back, of which one leaves by SIGTERM and one by SIGKILL."""

    def faults(run: Run) -> Iterator[None]:
        services = run.scene.services
        more = [run.scene.replica("predictor", number) for number in (2, 3)]
        while not run.over:
            for each in more:
                services[each.name] = each
                each.spawn()
                yield from run.passing(0.0, 3.0)
            run.faults["scaled up"] += 1
            yield from run.passing(pause_s / 2, pause_s)
            stopped, killed = run.dice.sample(more, 2)
            del services[stopped.name], services[killed.name]
            stopped.stop()
            run.kill(killed)
            run.faults["scaled down"] += 1
            yield from run.passing(pause_s, 2 * pause_s)

    return faults


def broker_restarts(*, pause_s: float = 8.0) -> Faults:
    """The broker stopped or killed, for a moment or for longer than a session lasts."""

    def faults(run: Run) -> Iterator[None]:
        broker = run.broker
        yield from run.passing(2.0, pause_s)
        while not run.over:
            if run.dice.random() < 0.5:
                run.kill(broker)
            else:
                broker.stop()
            run.faults["broker away"] += 1
            yield from run.passing(0.0, 2.0) if run.dice.random() < 0.7 else run.passing(10.0, 15.0)
            broker.spawn()
            while not broker.ready:
                yield
            yield from run.passing(pause_s, 2 * pause_s)

    return faults


def database_away(*, seconds: tuple[float, float], pause_s: float) -> Faults:
    """PostgreSQL stopped or killed, and started again."""

    def faults(run: Run) -> Iterator[None]:
        database = run.database
        yield from run.passing(pause_s)
        while not run.over:
            (database.stop if run.dice.random() < 0.5 else database.kill)()
            run.faults["database away"] += 1
            began = time.time()
            yield from run.passing(*seconds)
            run.away_ms.append((began * 1000, time.time() * 1000))
            database.spawn()
            while not database.ready:
                yield
            yield from run.passing(pause_s, 2 * pause_s)

    return faults


def connection_kills(run: Run) -> Iterator[None]:
    """Every connection to PostgreSQL cut by the server, again and again."""
    database = run.database
    while not run.over:
        yield from run.passing(0.2, 2.0)
        try:
            with psycopg2.connect(database.url.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND application_name LIKE 'fraud-alarm%'"
                )
                run.faults["connections cut"] += cursor.rowcount
        except psycopg2.OperationalError:  # somebody else took the database away
            continue


def mail_server_away(run: Run) -> Iterator[None]:
    """The mail server stopped, and started again."""
    mailbox = run.scene.stack.mailbox
    yield from run.passing(1.0, 5.0)
    while not run.over:
        mailbox.stop()
        run.faults["mail server away"] += 1
        yield from run.passing(1.0, 10.0)
        mailbox.start()
        yield from run.passing(2.0, 8.0)


def mail_troubles(*kinds: str, rest_s: float = 6.0) -> Faults:
    """The mail server misbehaves in one of these ways, then in none."""

    def faults(run: Run) -> Iterator[None]:
        mailbox = run.scene.stack.mailbox
        while not run.over:
            kind = run.dice.choice(kinds)
            mailbox.misbehave(kind)
            run.faults[f"mail server {kind}"] += 1
            yield from run.passing(3.0, 10.0)
            mailbox.misbehave(None)
            yield from run.passing(0.0, rest_s)

    return faults


def registry_away(run: Run) -> Iterator[None]:
    """The registry is gone whenever a predictor starts, but for the first time."""
    registry, predictor = run.scene.stack.registry, run.scene.services["predictor"]
    while not run.over and not predictor.ready:
        yield
    while not run.over:
        registry.stop()
        run.faults["registry away"] += 1
        for _ in range(3):
            if not run.over:
                run.kill(predictor)
                predictor.spawn()
            while not run.over and not predictor.ready:
                yield
            yield from run.passing(2.0, 8.0)
        registry.spawn()
        while not registry.ready:
            yield
        yield from run.passing(1.0, 5.0)


def api_troubles(run: Run) -> Iterator[None]:
    """All that the payments API is known for, mixed."""
    api = run.scene.stack.api
    api.misbehave(*FAULTS, share=0.3, seed=run.dice.randrange(2**32))
    run.faults["API misbehaves"] += 1
    while not run.over:
        yield
    api.misbehave()


def poison(run: Run) -> Iterator[None]:
    """Rubbish of many kinds on topic_1, in between; one that was cut off is mended and put back."""
    rubbish = Rubbish(run)
    due = time.monotonic()
    while not run.over:
        while time.monotonic() >= due:
            rubbish.write()
            due += run.dice.expovariate(RATE * _POISON_SHARE)
        yield
    rubbish.flush()
    for record in list(rubbish.cut_off)[:1]:
        while not (kept := run.scene.topics.dead_letters[record]):
            yield
        run.mended = rubbish.mend(record, kept[0])
        run.faults["mended and replayed"] += 1


def all_of(*parts: Faults) -> Faults:
    """Each goes on by itself."""

    def faults(run: Run) -> Iterator[None]:
        going = [part(run) for part in parts]
        while going:
            going = [each for each in going if next(each, _OVER) is not _OVER]
            yield

    return faults


_OVER = object()


class Rubbish:
    """Values that are no transactions, each unlike any other."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._numbers = count(1)
        self._producer = Producer(  # which, other than the services', hears of its successes
            {**run.scene.stack.properties, "enable.idempotence": True, "message.timeout.ms": 0, "linger.ms": 5},
            logger=logging.getLogger("librdkafka"),
        )
        self.cut_off: dict[Place, bytes] = {}

    def write(self) -> None:
        """One more on topic_1."""
        number = next(self._numbers)
        kind, content = _CUT_OFF if number == 1 else self._run.dice.choice(_RUBBISH)
        value = content(number)
        self._producer.produce(demo.TOPICS[0], value, on_delivery=partial(self._written, kind))
        self._producer.poll(0)

    def flush(self) -> None:
        """Wait until all of it is on the topic."""
        self._producer.flush()

    def mend(self, record: Place, letter: Place) -> str:
        """Have the record that was cut off put back whole, as an operator would. Returns its trans_num."""
        mended = self._run.work_dir / "mended.json"
        mended.write_bytes(self.cut_off[record] + b"}")
        topic, partition, offset = letter
        identity = f"{topic}:{partition}:{offset}"
        subprocess.run(
            [*python("fraudctl", "dead-letters", "replay", identity, "--value", str(mended))],
            env=self._run.scene.stack.addresses.environment(),
            check=True,
            capture_output=True,
        )
        return str(json.loads(mended.read_bytes())["trans_num"])

    def _written(self, kind: str, error: KafkaError | None, message: Message) -> None:
        if error:
            raise KafkaException(error)
        place = coordinates(message)
        self._run.rubbish.add(place)
        self._run.faults["rubbish"] += 1
        if kind == _CUT_OFF[0]:
            self.cut_off[place] = message.value() or b""


def _flawed(number: int, **flaws: object) -> bytes:
    """A transaction but for its flaws."""
    whole = msgspec.structs.asdict(REFERENCE) | {"trans_num": f"rubbish-{number}"}
    return msgspec.json.encode(whole | flaws)


_Kind = tuple[str, Callable[[int], bytes | None]]

_CUT_OFF: _Kind = ("cut off", lambda number: _flawed(number)[:-1])
_RUBBISH: tuple[_Kind, ...] = (
    _CUT_OFF,
    ("nothing", lambda _: None),
    ("empty", lambda _: b""),
    ("no text", lambda number: b"\xff\xfe" + number.to_bytes(4, "big")),
    ("no JSON", lambda number: f"temperature: {number}".encode()),
    ("no object", lambda number: msgspec.json.encode([number])),
    ("a page", lambda number: f"<!DOCTYPE html><html><body>Error {number}</body></html>".encode()),
    ("large", lambda number: str(number).encode() * 50_000),
    ("another thing", lambda number: msgspec.json.encode({"degrees": number})),
    ("other columns", lambda number: msgspec.json.encode({"columns": ["degrees"], "index": [0], "data": [[number]]})),
    ("amount as text", lambda number: _flawed(number, amt="12.50")),
    ("no merchant", lambda number: _flawed(number, merchant=None)),
    ("long card", lambda number: _flawed(number, cc_num=10**19 + number)),
    ("no such date", lambda number: _flawed(number, trans_date_trans_time="2024-13-45 25:61:61")),
)

# ---- scenarios ------------------------------------------------------------------------------------------------------


def _no_added_delay(run: Run, ledger: Ledger) -> list[str]:
    """Mails go out while the database is away as fast as while it is there."""
    meanwhile = [delay for at, delay in ledger.mail_delays if any(begin <= at <= end for begin, end in run.away_ms)]
    otherwise = [delay for at, delay in ledger.mail_delays if all(at < begin or at > end for begin, end in run.away_ms)]
    if not meanwhile or not otherwise:
        return ["no mails to compare"]
    run.figures["mail, ms, database there"] = round(median(otherwise))
    run.figures["mail, ms, database away"] = round(median(meanwhile))
    added_ms = median(meanwhile) - median(otherwise)
    return [f"mails took {added_ms:.0f} ms longer"] if added_ms > _LONGEST_ADDED_DELAY_MS else []


def _all_stopped_in_time(run: Run, _ledger: Ledger) -> list[str]:
    return [f"{name} did not end well within {_STOP_S:.0f} s of SIGTERM" for name in run.stubborn]


def _mended_is_predicted(run: Run, _ledger: Ledger) -> list[str]:
    predicted = {trans_num for trans_num, _ in run.scene.topics.visible_ms}
    return [] if run.mended in predicted else [f"the mended record {run.mended} is not predicted"]


def _one_recipient_has_all(run: Run, ledger: Ledger) -> list[str]:
    received = Counter(
        address for mail in messages(run.work_dir / "mail") for address in mail.message["X-Envelope-To"].split(", ")
    )
    reached = received["analyst@fraud-alarm.example"]
    return [] if reached == ledger.emails else [f"{reached} of {ledger.emails} mails reached the other recipient"]


SCENARIOS: dict[str, Scenario] = {
    "kill-predictor": Scenario(faults=kills("predictor"), least_kills=20),
    "kill-sink": Scenario(faults=kills("db_sink"), least_kills=20),
    "kill-alerter": Scenario(faults=kills("alerter"), least_kills=20),
    "kill-producer": Scenario(faults=kills("producer"), least_kills=20),
    "stop": Scenario(faults=stops(), broken=_all_stopped_in_time),
    "scale": Scenario(faults=scaling()),
    "broker-restart": Scenario(faults=broker_restarts()),
    "database-down": Scenario(
        faults=database_away(seconds=(_OUTAGE_S, _OUTAGE_S), pause_s=20.0), broken=_no_added_delay
    ),
    "database-kill-connections": Scenario(faults=connection_kills, minutes=1.0),
    "smtp-down": Scenario(faults=mail_server_away, minutes=1.0),
    "smtp-4xx": Scenario(faults=mail_troubles("4xx"), minutes=1.0),
    "smtp-5xx-one-recipient": Scenario(
        faults=mail_troubles("5xx-one-recipient", rest_s=0.0),
        minutes=1.0,
        environment=_TWO_RECIPIENTS,
        broken=_one_recipient_has_all,
    ),
    "smtp-hangs": Scenario(faults=mail_troubles("hang"), minutes=1.0, environment=_IMPATIENT),
    "registry-down-at-start": Scenario(faults=registry_away, minutes=1.0),
    "api-misbehaves": Scenario(faults=api_troubles, minutes=1.0),
    "poison": Scenario(faults=poison, minutes=1.0, broken=_mended_is_predicted),
    "everything": Scenario(
        faults=all_of(
            kills("predictor", pause_s=40.0),
            kills("db_sink", pause_s=40.0),
            kills("alerter", pause_s=40.0),
            kills("producer", pause_s=40.0),
            scaling(pause_s=20.0),
            broker_restarts(pause_s=25.0),
            database_away(seconds=(1.0, 15.0), pause_s=15.0),
            connection_kills,
            mail_troubles("4xx", "5xx-one-recipient", "hang", rest_s=20.0),
            api_troubles,
            poison,
        ),
        minutes=5.5,
        environment=_TWO_RECIPIENTS | _IMPATIENT,
        broken=_mended_is_predicted,
    ),
}


def campaign(
    names: Sequence[str], *, seed: int, minutes: float | None, work_dir: Path, console: Console
) -> Iterator[Result]:
    """Run these scenarios, one after the other. Raises StandInError, Outage or SettingsError."""
    for name in names:
        console.print(f"[bold]{name}[/bold], seed {seed}", highlight=False)
        yield _play(name, seed=seed, minutes=minutes, work_dir=work_dir / name, console=console)


def _play(name: str, *, seed: int, minutes: float | None, work_dir: Path, console: Console) -> Result:
    scenario = SCENARIOS[name]
    runs = []

    def steps(scene: Scene) -> Iterator[None]:
        yield  # the services start
        last_s = 60 * (scenario.minutes if minutes is None else minutes)
        dice = random.Random(f"{name} {seed}")  # noqa: S311 - makes faults, guards nothing
        run = Run(
            scene=scene,
            broker=cast(ApacheKafka, scene.stack.broker),  # both are its own
            database=cast(Postgres, scene.stack.database),
            dice=dice,
            ends=time.monotonic() + last_s,
            least_kills=scenario.least_kills if minutes is None else 0,
            work_dir=work_dir,
        )
        runs.append(run)
        yield from scenario.faults(run)
        scene.enough.set()

    options = Options(
        transactions=None,
        rate=RATE,
        source=None,
        fraud_rate=_FRAUD_RATE,
        broker="apache",
        database=None,
        work_dir=work_dir,
        environment=scenario.environment,
        confirmed=True,
    )
    ledger = demo.run(options, console, scenario=steps)
    (run,) = runs
    logs = [path.read_text(errors="replace") for path in sorted((work_dir / "logs").glob("*.log"))]
    evictions = sum(log.count("MAXPOLL") for log in logs)
    return Result(
        scenario=name,
        seed=seed,
        ledger=ledger,
        kills=run.kills,
        faults=run.faults,
        rubbish=len(run.rubbish),
        evictions=evictions,
        figures=run.figures,
        broken=[*broken_promises(run, ledger, logs), *scenario.broken(run, ledger)],
    )


def broken_promises(run: Run, ledger: Ledger, logs: Sequence[str]) -> list[str]:
    """The promises that did not hold, each in a line with the identities."""
    broken = [f"{what}: {_some(identities)}" for what, identities in ledger.suspects.items()]
    if ledger.mailed_frauds != ledger.predicted_frauds and not broken:
        broken.append(f"{ledger.mailed_frauds} of {ledger.predicted_frauds} frauds mailed")
    if ledger.repeated_mails > run.kills["alerter"]:
        broken.append(f"{ledger.repeated_mails} mails repeated, the alerter was killed {run.kills['alerter']} times")
    kept = ledger.dead_letter_places
    for what, places in {
        "rubbish that is not in the dead letters": run.rubbish - kept.keys(),
        "several dead letters of one record": {place for place, letters in kept.items() if len(letters) > 1},
        "good records in the dead letters": kept.keys() - run.rubbish,
    }.items():
        if places:
            broken.append(f"{what}: {_some(sorted(places))}")
    for sign, what in (("MAXPOLL", "a consumer was evicted"), ("Traceback", "a service ended with a traceback")):
        if any(sign in log for log in logs):
            broken.append(what)
    return broken


def _some(identities: Sequence[tuple[object, ...]]) -> str:
    shown = ", ".join(" ".join(map(str, identity)) for identity in identities[:_SHOWN])
    return f"{len(identities)}: {shown}{', ...' if len(identities) > _SHOWN else ''}"


def show(result: Result, console: Console) -> None:
    """Print what came of a scenario."""
    ledger = result.ledger
    table = Table(title=f"{result.scenario}, seed {result.seed}", show_header=False)
    table.add_row("transactions", f"{ledger.served:,}")
    table.add_row("lost / doubled / out of order", f"{ledger.lost} / {ledger.duplicates} / {ledger.out_of_order}")
    table.add_row(
        "frauds / mailed / mails repeated",
        f"{ledger.predicted_frauds} / {ledger.mailed_frauds} / {ledger.repeated_mails}",
    )
    table.add_row("rows", f"{ledger.rows:,}")
    table.add_row("rubbish / dead letters", f"{result.rubbish} / {ledger.dead_letters}", end_section=True)
    for name, times in result.kills.items():
        table.add_row(f"{name} killed", str(times))
    for what, figure in (*result.faults.items(), *result.figures.items()):
        table.add_row(what, str(figure))
    console.print(table)
    for line in result.broken:
        console.print(f"[bold red]broken:[/bold red] {escape(line)}", soft_wrap=True)
    if not result.broken:
        console.print("[bold green]Every promise held.")
