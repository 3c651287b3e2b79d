"""Faults that scenarios inject into the services and into their servers, while transactions stream."""

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2

from rehearsal import demo
from rehearsal.demo import Scene
from rehearsal.hostile import Hostile
from rehearsal.ledger import Place, Refusal, refused_answer
from rehearsal.rubbish import Rubbish
from sandbox.apache import ApacheKafka
from sandbox.postgres import Postgres
from sandbox.processes import Process, StandInError, python
from services.catalogue import CORE

STOP_TIMEOUT_S = 10.0  # as long as `docker stop` waits before it kills a container
_RUBBISH_SHARE = 0.005  # rubbish records per transaction
_TICK_S = 0.25
_WRITTEN_S = 30.0


@dataclass(kw_only=True)
class Run:
    """One run of a scenario: the processes that its faults act on, and a record of the faults injected."""

    scene: Scene
    broker: ApacheKafka
    database: Postgres
    dice: random.Random
    rate: float  # transactions per second
    ends: float  # time.monotonic() after which no new fault is injected
    least_kills: int
    work_dir: Path
    kills: Counter[str] = field(default_factory=Counter)  # by service
    faults: Counter[str] = field(default_factory=Counter)  # by the faults' names in the report
    bad_stops: list[str] = field(default_factory=list)  # services that exited with an error or too late after SIGTERM
    rubbish: set[Refusal] = field(default_factory=set)  # what must become dead letters
    fixed: str | None = None  # trans_num of the dead letter that was replayed with a corrected value
    figures: dict[str, int] = field(default_factory=dict)
    database_outages_ms: list[tuple[float, float]] = field(default_factory=list)  # start and end of each (epoch ms)

    @property
    def over(self) -> bool:
        """True if the run was interrupted, or if the time is up and there were enough kills."""
        done = time.monotonic() >= self.ends and self.kills.total() >= self.least_kills
        return done or self.scene.enough.is_set()

    def kill(self, process: Process) -> None:
        """Kill the process with SIGKILL, and count the kill."""
        process.kill()
        self.kills[process.name.partition("-")[0]] += 1

    def pause(self, least_s: float, most_s: float | None = None) -> Iterator[None]:
        """Yield for a random time between `least_s` and `most_s` seconds, or until the run is over."""
        until = time.monotonic() + self.dice.uniform(least_s, least_s if most_s is None else most_s)
        while time.monotonic() < until and not self.over:
            yield


Faults = Callable[[Run], Iterator[None]]
"""A function that injects faults until the run is over, then repairs the damage.

The function's iterator is advanced four times per second.
"""


def kills(name: str, *, pause_s: float = 3.0) -> Faults:
    """Kill a service with SIGKILL at random moments, sometimes during startup, and restart the service at once."""

    def faults(run: Run) -> Iterator[None]:
        while not run.over:
            process = run.scene.services[name]
            if run.dice.random() < 0.8:
                while not run.over and not process.ready:
                    yield
            yield from run.pause(0.0, pause_s)
            time.sleep(run.dice.uniform(0, _TICK_S))
            if run.over:
                break
            run.kill(process)
            process.spawn()
            yield

    return faults


def stops(*, pause_s: float = 3.0) -> Faults:
    """Stop the services in turn with SIGTERM, at random moments, and restart each service at once."""

    def faults(run: Run) -> Iterator[None]:
        order: list[str] = []
        while not run.over:
            order = order or run.dice.sample(CORE, len(CORE))
            process = run.scene.services[order.pop()]
            while not run.over and not process.ready:
                yield
            yield from run.pause(0.0, pause_s)
            time.sleep(run.dice.uniform(0, _TICK_S))
            if run.over:
                break
            if process.stop(timeout_s=STOP_TIMEOUT_S):
                run.bad_stops.append(process.name)
            run.faults[f"{process.name} stopped"] += 1
            process.spawn()
            yield

    return faults


def scaling(*, pause_s: float = 8.0) -> Faults:
    """Repeatedly scale the predictor to three replicas, then stop one with SIGTERM and kill one with SIGKILL."""

    def faults(run: Run) -> Iterator[None]:
        services = run.scene.services
        more = [run.scene.replica("predictor", number) for number in (2, 3)]
        while not run.over:
            for each in more:
                services[each.name] = each
                each.spawn()
                yield from run.pause(0.0, 3.0)
            run.faults["scaled up"] += 1
            yield from run.pause(pause_s / 2, pause_s)
            stopped, killed = run.dice.sample(more, 2)
            del services[stopped.name], services[killed.name]
            stopped.stop()
            run.kill(killed)
            run.faults["scaled down"] += 1
            yield from run.pause(pause_s, 2 * pause_s)

    return faults


def broker_restarts(*, pause_s: float = 8.0) -> Faults:
    """Stop or kill the broker. Restart the broker within 2 s, or after the consumers' sessions have expired."""

    def faults(run: Run) -> Iterator[None]:
        broker = run.broker
        yield from run.pause(2.0, pause_s)
        while not run.over:
            if run.dice.random() < 0.5:
                run.kill(broker)
            else:
                broker.stop()
            run.faults["broker away"] += 1
            yield from run.pause(0.0, 2.0) if run.dice.random() < 0.7 else run.pause(10.0, 15.0)
            broker.spawn()
            while not broker.ready:
                yield
            yield from run.pause(pause_s, 2 * pause_s)

    return faults


def database_away(*, seconds: tuple[float, float], pause_s: float) -> Faults:
    """Stop or kill PostgreSQL, and restart it after a random time within the range `seconds`."""

    def faults(run: Run) -> Iterator[None]:
        database = run.database
        yield from run.pause(pause_s)
        while not run.over:
            (database.stop if run.dice.random() < 0.5 else database.kill)()
            run.faults["database away"] += 1
            began = time.time()
            yield from run.pause(*seconds)
            run.database_outages_ms.append((began * 1000, time.time() * 1000))
            database.spawn()
            while not database.ready:
                yield
            yield from run.pause(pause_s, 2 * pause_s)

    return faults


def connection_kills(run: Run) -> Iterator[None]:
    """Repeatedly make PostgreSQL close all connections of the services."""
    database = run.database
    while not run.over:
        yield from run.pause(0.2, 2.0)
        try:
            with psycopg2.connect(database.url.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND application_name LIKE 'fraud-alarm%'"
                )
                run.faults["connections cut"] += cursor.rowcount
        except psycopg2.OperationalError:  # another fault has stopped the database
            continue


def mail_server_away(run: Run) -> Iterator[None]:
    """Repeatedly stop the mail server and restart it."""
    mailbox = run.scene.stack.mailbox
    yield from run.pause(1.0, 5.0)
    while not run.over:
        mailbox.stop()
        run.faults["mail server away"] += 1
        yield from run.pause(1.0, 10.0)
        mailbox.start()
        yield from run.pause(2.0, 8.0)


def mail_troubles(*kinds: str, rest_s: float = 6.0) -> Faults:
    """Make the mail server alternate between one of these faults and up to `rest_s` seconds of normal operation."""

    def faults(run: Run) -> Iterator[None]:
        mailbox = run.scene.stack.mailbox
        while not run.over:
            kind = run.dice.choice(kinds)
            mailbox.misbehave(kind)
            run.faults[f"mail server {kind}"] += 1
            yield from run.pause(3.0, 10.0)
            mailbox.misbehave(None)
            yield from run.pause(0.0, rest_s)

    return faults


def registry_away(run: Run) -> Iterator[None]:
    """When the predictor has a model, stop the registry, restart the predictor three times, then start the registry."""
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
            yield from run.pause(2.0, 8.0)
        registry.spawn()
        while not registry.ready:
            yield
        yield from run.pause(1.0, 5.0)


def api_troubles(*kinds: str) -> Faults:
    """Make the payments API simulate these faults, in 30 % of the calls."""

    def faults(run: Run) -> Iterator[None]:
        api = run.scene.stack.api
        api.misbehave(*kinds, share=0.3, seed=run.dice.randrange(2**32))
        run.faults["API misbehaves"] += 1
        while not run.over:
            yield
        api.misbehave()
        refused = api.refused()
        run.rubbish.update(map(refused_answer, refused))
        run.faults["answers or rows refused"] += len(refused)

    return faults


def poison(run: Run) -> Iterator[None]:
    """Mix rubbish into the transactions on topic_1. At the end, replay one dead letter with a corrected value."""
    rubbish = Rubbish(run.scene.stack.properties, demo.TOPICS[0], run.dice)
    due = time.monotonic()
    while not run.over:
        while time.monotonic() >= due:
            rubbish.write()
            due += run.dice.expovariate(run.rate * _RUBBISH_SHARE)
        yield
    rubbish.flush()
    run.rubbish.update(("predictor", *place) for place in rubbish.places)
    run.faults["rubbish"] += len(rubbish.places)
    for place, value in list(rubbish.cut_off.items())[:1]:
        while not (letters := run.scene.topics.dead_letters["predictor", *place]):
            yield
        run.fixed = _replay(run, letters[0], value + b"}")
        run.faults["fixed and replayed"] += 1


def hostile_records(run: Run) -> Iterator[None]:
    """Write hostile records to both topics. At the end, find out where they are."""
    hostile = Hostile(run.scene.stack.properties, run.dice)
    while not run.over:
        hostile.write()
        yield from run.pause(0.0, 2 * _TICK_S)
    hostile.close()
    found, deadline = run.scene.topics.marked, time.monotonic() + _WRITTEN_S
    while absent := hostile.refused_by.keys() - found.keys():
        if time.monotonic() > deadline:
            raise StandInError(f"hostile records were not written: {sorted(absent)}")
        yield
    for mark, services in hostile.refused_by.items():
        run.rubbish.update((service, *found[mark]) for service in services)
    run.faults["hostile records"] += len(hostile.refused_by)


def _replay(run: Run, letter: Place, value: bytes) -> str:
    """Replay a dead letter with this value, using the fraudctl command. Returns the transaction's trans_num."""
    path = run.work_dir / "fixed.json"
    path.write_bytes(value)
    topic, partition, offset = letter
    subprocess.run(
        [*python("fraudctl", "dead-letters", "replay", f"{topic}:{partition}:{offset}", "--value", str(path))],
        env=run.scene.stack.addresses.environment(),
        check=True,
        capture_output=True,
    )
    return str(json.loads(value)["trans_num"])


def all_of(*parts: Faults) -> Faults:
    """Inject all of these faults at the same time, independently of each other."""

    def faults(run: Run) -> Iterator[None]:
        going = [part(run) for part in parts]
        while going:
            going = [each for each in going if next(each, _OVER) is not _OVER]
            yield

    return faults


_OVER = object()
