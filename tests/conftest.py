"""The real parts that the tests run against, started once, and a rig that runs services on them."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

# Before numpy, scikit-learn and MLflow are imported: several workers share the processors, and MLflow reports nothing.
os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

import forked
import hypothesis
import msgspec
import pytest
import sqlalchemy as sa
from _pytest.nodeid import coerce_node_id
from confluent_kafka import Message, Producer, TopicPartition

from rehearsal.stack import Addresses, service
from sandbox.apache import ApacheKafka, missing
from sandbox.embedded import CLIENT_SETTINGS, EmbeddedBroker
from sandbox.generator import training_frame, transactions
from sandbox.mailbox import Mailbox
from sandbox.postgres import Postgres
from sandbox.processes import Child, Process, free_port
from sandbox.registry import Registry
from services.db_sink.table import connect
from shared.dead_letters import SUFFIX
from shared.kafka import topics
from shared.kafka.clients import consumer
from shared.records import RAW_COLUMNS, Transaction, encode_transaction, read_split

hypothesis.settings.register_profile("unhurried", hypothesis.settings(deadline=None))
hypothesis.settings.load_profile("unhurried")

START = datetime(2024, 5, 17, 21, 30, tzinfo=UTC)
_GROUPS = ("PREDICTOR_GROUP", "ALERTER_GROUP", "WEBHOOK_GROUP", "DB_SINK_GROUP")
_Server = TypeVar("_Server", bound=Process)
SAMPLE = Path(
    os.environ.get("FRAUD_ALARM_SAMPLE") or os.devnull
)  # rows of the real training file, where they are at hand
EFFORT = int(os.environ.get("FRAUD_ALARM_EFFORT", "1"))  # how many times as much is tried
needs_sample = pytest.mark.skipif(not SAMPLE.is_file(), reason="FRAUD_ALARM_SAMPLE names no file")
_SERVERS = {"apache", "embedded", "mailbox", "postgres", "registry", "secured"}  # the fixtures that start one


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that start a server, and order all of them so that several workers end at about the same time.

    A test that starts a server without these fixtures carries the mark `server` itself: `_no_server` sees to it.
    """
    stacks, alone = cycle(["stack 1", "stack 2"]), cycle(["alone 1", "alone 2"])
    for item in items:
        assert isinstance(item, pytest.Function)
        if _SERVERS & set(item.fixturenames):
            item.add_marker("server")
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.xdist_group(next(alone)))
        elif not item.get_closest_marker("xdist_group") and any(each[-1].scope == "module" for each in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))  # one worker makes it, once
        elif item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.xdist_group(next(stacks)))  # more whole stacks at once would only be slower
        group = item.get_closest_marker("xdist_group")
        if group and getattr(config.option, "loadgroup", False):
            item._id = coerce_node_id(f"{item.nodeid}@{group.args[0]}")  # as pytest-xdist 3.8 still did for pytest 9.1
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, float, bool, bool]:
    """What may take long comes first, what starts no server late, and what must be alone when nothing else is left.

    One worker has all tests of a group, so groups come before single tests.
    """
    timeout = item.get_closest_marker("timeout")
    return (
        item.get_closest_marker("alone") is not None,
        -timeout.args[0] if timeout else 0,
        item.get_closest_marker("xdist_group") is None,
        item.get_closest_marker("server") is None,
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """While tests of how long something takes run, two at once, none of the others does."""
    alone = item.get_closest_marker("alone") is not None
    here = Path(__file__).parent  # any three files do, and nothing is left behind
    with (
        (here / "pipeline.py").open() as queue,
        (here / f"{'conftest' if alone else 'secured'}.py").open() as own,
        (here / f"{'secured' if alone else 'conftest'}.py").open() as other,
    ):
        flock(queue, LOCK_EX)  # so that nobody overtakes who waits
        flock(other, LOCK_EX)  # until none of the other kind runs
        flock(other, LOCK_UN)
        flock(own, LOCK_SH)
        flock(queue, LOCK_UN)
        return (yield)


def until(condition: Callable[[], object], *, timeout_s: float = 60.0, what: str = "the condition") -> None:
    """Wait until the condition holds, and fail if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        asked = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < deadline, f"{what} did not come true in {timeout_s:.0f} s"
        time.sleep(max(0.05, 2 * (now - asked)))  # asking must not take the processor from what is waited for


def make_transactions(count: int, *, seed: int = 7, fraud_rate: float = 0.05) -> list[Transaction]:
    """Generated transactions as they lie on topic_1."""
    rows = _generated(-(-count // 1000), seed, fraud_rate)[:count]
    table = {"columns": RAW_COLUMNS, "index": list(range(count)), "data": rows}
    return list(read_split(msgspec.json.encode(table)).transactions)


@cache
def _generated(thousands: int, seed: int, fraud_rate: float) -> list[list[Any]]:
    """The generator makes whole days, of some thousand rows, however few are wanted."""
    return list(islice(transactions(seed=seed, start=START, fraud_rate=fraud_rate), 1000 * thousands))


@dataclass
class Rig:
    """Topics of its own on a broker, and the services on them."""

    directory: Path
    properties: Mapping[str, str]
    environment: dict[str, str]
    topic_1: str
    topic_2: str
    processes: list[Process] = field(default_factory=list)
    launch: Callable[..., Child] = forked.Forked

    def start(self, name: str, *, ready: bool = True, **environment: str) -> Process:
        """Start a service; wait until it has work to do unless `ready` is False."""
        process = service(name, self.directory, self.environment | environment)
        process.launch = self.launch
        self.processes.append(process)
        process.spawn()
        if ready:
            process.wait_ready()
        return process

    def log(self, name: str) -> str:
        """What the service logged so far."""
        return (self.directory / "logs" / f"{name}.log").read_text()

    def put(self, topic: str, values: Sequence[bytes | None], *, key: bytes | None = None) -> None:
        """Write records, in order."""
        producer = Producer({**self.properties, "linger.ms": 5, "log_level": 0})
        for value in values:
            producer.produce(topic, value=value, key=key)
        assert producer.flush(20) == 0

    def put_transactions(self, batch: Sequence[Transaction]) -> None:
        """Write transactions to topic_1 as the producer does."""
        producer = Producer({**self.properties, "linger.ms": 5, "log_level": 0, "partitioner": "murmur2_random"})
        for transaction in batch:
            producer.produce(self.topic_1, value=encode_transaction(transaction), key=transaction.key)
        assert producer.flush(20) == 0

    def read(self, topic: str, count: int, *, timeout_s: float = 60.0, extra_s: float = 0.3) -> list[Message]:
        """The first `count` committed records of a topic, and those that come within `extra_s` after them."""
        reader = consumer(self.properties, group=f"reader-{uuid.uuid4()}")
        try:
            ends = topics.ends(self.properties, [topic])
            reader.assign([TopicPartition(each.topic, each.partition, 0) for each in ends])
            found: list[Message] = []
            deadline = time.monotonic() + timeout_s
            while len(found) < count and time.monotonic() < deadline:
                found += [message for message in reader.consume(500, 0.2) if message.error() is None]
            found += [message for message in reader.consume(500, extra_s) if message.error() is None]
            assert len(found) >= count, f"{len(found)} of {count} records on {topic}"
            return found
        finally:
            reader.close()


def make_rig(directory: Path, properties: Mapping[str, str], environment: Mapping[str, str], *, embedded: bool) -> Rig:
    """Topics and consumer groups of the test's own on a broker that is there."""
    (directory / "client.properties").write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    name = uuid.uuid4().hex[:8]
    rig = Rig(directory, properties, dict(environment), f"in-{name}", f"out-{name}")
    rig.environment |= {
        "TOPIC_1": rig.topic_1,
        "TOPIC_2": rig.topic_2,
        "CLIENT_PROPERTIES": str(directory / "client.properties"),
        "REPLICA": "first",
        "JOURNAL_DIRECTORY": str(directory / "journal"),
        "MODEL_CACHE_DIRECTORY": str(directory / "models"),
        **{group: f"{group}-{name}" for group in _GROUPS},
    }
    if embedded:
        topics.use(properties, [rig.topic_1, rig.topic_2])
    else:
        topics.ends(properties, topics.create(properties, [rig.topic_1, rig.topic_2]))  # their leaders are at work
    return rig


@pytest.fixture(scope="session")
def session_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what lives as long as the session."""
    return tmp_path_factory.mktemp("session")


class Shared:
    """Servers that all workers of a session use: who needs one first starts it, and ends it when all have finished."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Process] = []
        self._users = (directory / "users").open("w")
        flock(self._users, LOCK_SH)

    def server(self, kind: Callable[..., _Server], fill: Callable[[_Server], None] | None = None) -> _Server:
        """A server of this kind, started and filled by whoever is first to ask for it."""
        directory = self._directory / kind.__name__
        with directory.with_suffix(".port").open("a+") as file:
            flock(file, LOCK_EX)
            file.seek(0)
            if known := file.read():
                return kind(directory, port=int(known))
            port = free_port()
            server = kind(directory, port=port)
            self._started.append(server.start())
            if fill:
                fill(server)
            file.write(str(port))
            return server

    def close(self) -> None:
        """End what this worker started, once no other uses it."""
        flock(self._users, LOCK_UN)  # first, since two may wait for each other
        if self._started:
            flock(self._users, LOCK_EX)
        for server in reversed(self._started):
            server.stop()
        self._users.close()


@pytest.fixture(scope="session", autouse=True)
def shared(session_directory: Path, pytestconfig: pytest.Config) -> Shared:
    """What the workers of this session share."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    made = Shared(session_directory if alone else session_directory.parents[1])
    pytestconfig.add_cleanup(made.close)  # it waits for the others, which is not to count as the time of a test
    return made


@pytest.fixture(autouse=True)
def _no_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked as one that starts a server cannot."""
    if not request.node.get_closest_marker("server"):
        unmarked = "mark this test with pytest.mark.server, since it starts one"
        monkeypatch.setattr(Process, "spawn", lambda _: pytest.fail(unmarked))


@pytest.fixture(scope="session", autouse=True)
def _mlflow(session_directory: Path) -> Iterator[None]:
    """What it fetches to look at, and leaves there, is left among the tests' own files; and it is patient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")  # which importing the predictor takes away
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        patch.setattr("tempfile.tempdir", str(session_directory))
        yield


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> Iterator[None]:
    """Model hosts of this process are forks of another one, which starts when the first is wanted."""
    with pytest.MonkeyPatch.context() as patch:
        server = cache(forked.host_server)
        patch.setattr("services.predictor.hosted.launch", lambda python: server().launch(python))
        yield


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services are forks, whatever starts them in this process."""
    monkeypatch.setattr(Process, "launch", staticmethod(forked.launch))


@pytest.fixture(scope="session")
def embedded(session_directory: Path) -> Iterator[EmbeddedBroker]:
    """The embedded broker."""
    with EmbeddedBroker(session_directory / "embedded") as broker:
        yield broker


@pytest.fixture(scope="session")
def apache(shared: Shared) -> ApacheKafka:
    """A real Apache Kafka. Where it cannot run the test is skipped, in CI failed."""
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(f"Apache Kafka must run in CI: {reason}")
        pytest.skip(reason)
    return shared.server(ApacheKafka)


@pytest.fixture(scope="session")
def postgres(shared: Shared) -> Postgres:
    """A PostgreSQL server."""
    return shared.server(Postgres)


@pytest.fixture
def engine(postgres: Postgres) -> Iterator[sa.Engine]:
    """A database of this test's own."""
    name = f"test_{uuid.uuid4().hex}"
    owner = sa.create_engine(postgres.url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    own = connect(str(sa.make_url(postgres.url).set(database=name)))
    yield own
    own.dispose()
    with owner.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    owner.dispose()


@pytest.fixture(scope="session")
def registry(shared: Shared) -> Registry:
    """An MLflow registry whose model `fraud` has a champion."""
    from training import train  # which takes seconds: not for the process that only deals out the tests
    from training.aliases import Alias

    def champion(server: Registry) -> None:
        train.register(train.fit(training_frame(seed=1), seed=1), Alias(server.uri, "fraud", "champion"))
        shutil.copytree(server.directory, _copy_of(server))

    return shared.server(Registry, champion)


@pytest.fixture
def trained_directory(tmp_path: Path, registry: Registry) -> Path:
    """A work directory of the demo whose registry has a champion already, because to train one takes long."""
    shutil.copytree(_copy_of(registry), tmp_path / "work" / "registry")
    return tmp_path / "work"


def _copy_of(registry: Registry) -> Path:
    """The registry's files as they were when it had only its champion."""
    return registry.directory.with_name("champion")


@pytest.fixture
def mailbox(tmp_path: Path) -> Iterator[Mailbox]:
    """A mail server of this test's own."""
    with Mailbox(tmp_path / "mail") as server:
        yield server


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The services' environment with nobody at the other ends; tests lay their own over it."""
    nowhere = Addresses(
        client_properties=tmp_path / "client.properties",
        api_url="http://127.0.0.1:9/current-transactions",
        registry_uri="http://127.0.0.1:9",
        database_url="postgresql://nobody@127.0.0.1:9/none",
        smtp_port=9,
        delivery="at_least_once",
    )
    return nowhere.environment()


@pytest.fixture
def surroundings(engine: sa.Engine, registry: Registry, mailbox: Mailbox) -> dict[str, str]:
    """What the environment must say for the services to find these three."""
    return {
        "DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "MLFLOW_TRACKING_URI": registry.uri,
        "SMTP_PORT": str(mailbox.port),
    }


@pytest.fixture
def rig(tmp_path: Path, embedded: EmbeddedBroker, environment: dict[str, str]) -> Iterator[Rig]:
    """Services on the embedded broker."""
    properties = {"bootstrap.servers": embedded.bootstrap} | CLIENT_SETTINGS
    # Coverage counts what services do here. On Apache Kafka they do the same, and being counted costs a start a second.
    environment |= {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    made = make_rig(tmp_path, properties, environment, embedded=True)
    yield made
    with ThreadPoolExecutor() as pool:  # a process that is killed writes nothing of what it covered
        list(pool.map(lambda process: process.stop(5.0), made.processes))


@pytest.fixture
def apache_rig(tmp_path: Path, apache: ApacheKafka, environment: dict[str, str]) -> Iterator[Rig]:
    """Services on Apache Kafka, exactly once."""
    made = make_rig(
        tmp_path, {"bootstrap.servers": apache.bootstrap}, environment | {"DELIVERY": "exactly_once"}, embedded=False
    )
    yield made
    for process in made.processes:
        process.kill()


def dead_letter_topic(topic: str) -> str:
    """Where a topic's dead letters go."""
    return topic + SUFFIX
