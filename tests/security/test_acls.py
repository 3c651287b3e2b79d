"""The pipeline on a real Apache Kafka that lets each user do what docs/security.md lists, and nothing else."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar, NamedTuple

import msgspec
import pytest
import sqlalchemy as sa
from command_line import call
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from conftest import Rig, make_transactions, until
from secured import SecuredKafka
from typer.testing import CliRunner

from fraudctl.__main__ import app
from sandbox.generator import training_frame
from sandbox.mailbox import Mailbox, messages
from sandbox.registry import Registry
from shared.kafka import topics
from shared.records import RAW_COLUMNS, Transaction, encode_prediction, encode_transaction
from training import train
from training.aliases import Alias

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

_DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
_ROW = re.compile(r"^\| (\w+) \| (Topic|Group|TransactionalId) \| `([\w.-]+)(\*?)` \| (\w+) \|", re.MULTILINE)
_KINDS = {"Topic": ResourceType.TOPIC, "Group": ResourceType.GROUP, "TransactionalId": ResourceType.TRANSACTIONAL_ID}
_REFUSED = {
    "Topic": "Topic authorization failed",
    "Group": "Group authorization failed",
    "TransactionalId": "Transactional Id authorization failed",
}
_TRANSACTIONS = iter(make_transactions(200))
_NOTHING = msgspec.json.encode({"columns": RAW_COLUMNS, "index": [], "data": []})


class Acl(NamedTuple):
    """A row of the document."""

    user: str
    resource: str
    name: str
    star: str
    operation: str

    def __str__(self) -> str:
        return f"{self.user}: {self.operation} {self.resource} {self.name}{self.star}"

    @property
    def terms(self) -> tuple[object, ...]:
        """What AclBinding and AclBindingFilter are made of."""
        pattern = ResourcePatternType.PREFIXED if self.star else ResourcePatternType.LITERAL
        operation = AclOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.operation).upper()]
        return _KINDS[self.resource], self.name, pattern, f"User:{self.user}", "*", operation, AclPermissionType.ALLOW


ACLS = [Acl(*found) for found in _ROW.findall(_DOCUMENT.read_text())]


def rows(user: str, *, but: Sequence[str] = ()) -> list[Acl]:
    return [acl for acl in ACLS if acl.user == user and str(acl) not in but]


class World(BaseHTTPRequestHandler):
    """The payments API, which serves what it is given, and the end of the webhook."""

    bodies: ClassVar[list[bytes]] = []

    def do_GET(self) -> None:
        self._answer(self.bodies.pop(0) if self.bodies else _NOTHING)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class Guarded:
    """The services on the broker, each with its own login."""

    broker: SecuredKafka
    rig: Rig

    def environment(self, user: str) -> dict[str, str]:
        path = self.rig.directory / f"{user}.properties"
        properties = self.broker.properties("PLAIN", user)
        path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        return {"CLIENT_PROPERTIES": str(path)}

    def allow(self, acls: Sequence[Acl]) -> None:
        admin = self.broker.admin()
        for done in admin.create_acls([AclBinding(*acl.terms) for acl in acls]).values():
            done.result(15)
        until(lambda: all(known(admin, acl) for acl in acls), what="the broker's own knowledge of it")

    def forbid(self, acl: Acl) -> None:
        admin = self.broker.admin()
        for done in admin.delete_acls([AclBindingFilter(*acl.terms)]).values():
            assert done.result(15)
        until(lambda: not known(admin, acl), what="the broker's own knowledge of it")

    def give_work(self, user: str) -> Transaction:
        """Something for the service to do: a transaction, and something that is none."""
        transaction = next(_TRANSACTIONS)
        if user == "producer":
            row = [getattr(transaction, name, 1_730_134_684_025) for name in RAW_COLUMNS]
            bad = [*row[:4], *row]
            World.bodies.append(msgspec.json.encode({"columns": RAW_COLUMNS, "index": [0, 1], "data": [row, bad]}))
        elif user == "predictor":
            self.rig.put("topic_1", [encode_transaction(transaction), b"rubbish"])
        else:
            self.rig.put("topic_2", [encode_prediction(encode_transaction(transaction), 1), b"rubbish"])
        return transaction

    def lines(self, user: str, since: int) -> list[str]:
        return self.rig.log(user)[since:].splitlines()

    def is_well(self, user: str) -> bool:
        """Whether each outage that it logged is over."""
        log = self.rig.log(user)
        return log.count("event='outage' ") == log.count("event='outage_over' ")


def known(admin: AdminClient, acl: Acl) -> bool:
    """Whether the broker goes by it."""
    return bool(admin.describe_acls(AclBindingFilter(*acl.terms)).result(15))


def reports(line: str, acl: Acl) -> bool:
    """Whether it says what is missing."""
    return acl.name in line and _REFUSED[acl.resource] in line and ("event='outage'" in line or "rests'" in line)


@pytest.fixture(scope="module")
def world() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), World)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def guarded(
    tmp_path: Path,
    environment: dict[str, str],
    secured: SecuredKafka,
    world: str,
    registry: Registry,
    engine: sa.Engine,
    mailbox: Mailbox,
) -> Iterator[Guarded]:
    """Topics and rights, and nothing started yet."""
    owner = secured.properties("PLAIN")
    topics.create(owner, ["topic_1", "topic_2"], partitions=1)
    topics.create(owner, ["topic_2.challenger"], partitions=1, letters=False)
    settings = {
        "API_URL": world,
        "BACKOFF_INITIAL_SECONDS": "0.1",
        "BACKOFF_MAX_SECONDS": "0.5",
        "DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "DELIVERY": "exactly_once",
        "JOURNAL_DIRECTORY": str(tmp_path / "journal"),
        "MLFLOW_TRACKING_URI": registry.uri,
        "MODEL_CACHE_DIRECTORY": str(tmp_path / "models"),
        "MODEL_NAME": "guarded",
        "MODEL_REFRESH_SECONDS": "0.5",
        "POLL_INTERVAL_SECONDS": "0.1",
        "REPLICA": "first",
        "SMTP_PORT": str(mailbox.port),
        "WEBHOOK_SECRET": "sixteen characters",
        "WEBHOOK_URL": world,
    }
    rig = Rig(tmp_path, owner, environment | settings, "topic_1", "topic_2")
    made = Guarded(secured, rig)
    made.allow(ACLS)
    yield made
    for process in rig.processes:
        process.kill()


def test_with_exactly_these_rights_it_runs_and_each_that_is_taken_away_is_named_until_it_is_back(
    guarded: Guarded, registry: Registry, engine: sa.Engine, mailbox: Mailbox
) -> None:
    trained = train.fit(training_frame(seed=1).head(4000), seed=1)
    for alias in ("champion", "challenger"):
        train.register(trained, Alias(registry.uri, "guarded", alias))
    users = ("producer", "predictor", "alerter", "db_sink")
    services = {user: guarded.rig.start(user, ready=False, **guarded.environment(user)) for user in users}
    for each in services.values():
        each.wait_ready()
    until(lambda: services["predictor"].said("alias='challenger'"), what="the challenger")
    for user in users:
        guarded.give_work(user)

    def stored() -> int:
        with engine.connect() as connection:
            return int(connection.execute(sa.text("SELECT count(*) FROM transactions")).scalar_one())

    until(lambda: stored() == 4, what="the four transactions in the table")
    until(lambda: len(list(messages(mailbox.directory))) >= 2, what="the mails")
    for topic in ("topic_1.dlq", "topic_2.dlq", "topic_2.challenger"):
        guarded.rig.read(topic, 1)
    assert not [line for user in users for line in guarded.lines(user, 0) if "authorization failed" in line]

    recovery = ("producer: Read Topic topic_1", "producer: Read Topic topic_1.dlq")
    challenge = "predictor: Write Topic topic_2.challenger"  # first: afterwards it rests
    challenged = [acl for acl in ACLS if str(acl) == challenge]
    for acl in challenged + [acl for user in users for acl in rows(user, but=(*recovery, challenge))]:
        seen = len(guarded.rig.log(acl.user))
        guarded.forbid(acl)
        guarded.give_work(acl.user)

        def reported(acl: Acl = acl, seen: int = seen) -> list[str]:
            return [line for line in guarded.lines(acl.user, seen) if reports(line, acl)]

        until(reported, what=f"a line on {acl}")
        assert services[acl.user].running
        guarded.allow([acl])
        if acl not in challenged:
            until(lambda: guarded.is_well(acl.user), what=f"the end, with {acl}")  # noqa: B023
        groups: list[str] = []
        for line in guarded.lines(acl.user, seen):
            if "event='outage_over'" in line:  # records that were fetched before may still have come
                groups.clear()
            elif reports(line, acl):
                groups.append(line.partition(" group=")[2])
            assert len(groups) == len(set(groups)), f"{acl} is reported twice"
    for each in services.values():
        assert each.stop(10) == 0


def test_of_two_rights_that_are_missing_the_second_is_named_too(guarded: Guarded) -> None:
    sink = guarded.rig.start("db_sink", **guarded.environment("db_sink"))
    for missing in ("db_sink: Read Topic topic_2", "db_sink: Read Group db_sink"):
        (acl,) = [acl for acl in rows("db_sink") if str(acl) == missing]
        guarded.forbid(acl)
        guarded.give_work("db_sink")
        until(lambda: any(reports(line, acl) for line in guarded.lines("db_sink", 0)), what=f"a line on {acl}")  # noqa: B023

    guarded.allow(rows("db_sink"))

    until(lambda: guarded.is_well("db_sink"), what="the end of both")
    assert guarded.rig.log("db_sink").count("event='resumed'") < 10  # it says so when it goes on, not at each try
    assert sink.stop(10) == 0


@pytest.mark.parametrize("topic", ["topic_1", "topic_1.dlq"])
def test_a_producer_that_may_not_see_what_it_left_undone_says_so(guarded: Guarded, topic: str) -> None:
    (write,) = [acl for acl in rows("producer") if str(acl) == "producer: Write Topic topic_1"]
    (read,) = [acl for acl in rows("producer") if str(acl) == f"producer: Read Topic {topic}"]
    guarded.forbid(write)
    guarded.give_work("producer")
    environment = guarded.environment("producer")
    process = guarded.rig.start("producer", **environment)
    until(lambda: process.said("authorization failed"), what="the outage")
    assert process.stop(10) == 0
    guarded.allow([write])
    guarded.forbid(read)
    seen = len(guarded.rig.log("producer"))

    process = guarded.rig.start("producer", **environment)

    until(lambda: any(reports(line, read) for line in guarded.lines("producer", seen)), what="a line on it")
    guarded.allow([read])
    until(lambda: process.said("event='outage_over'"), what="its end")
    assert process.stop(10) == 0


def test_the_sink_cannot_read_topic_1_and_no_service_reads_anothers_group(guarded: Guarded) -> None:
    sink = guarded.rig.start("db_sink", ready=False, TOPIC_2="topic_1", **guarded.environment("db_sink"))
    until(lambda: sink.said("reason='topic_1: "), what="a line on the topic")
    assert sink.said("Topic authorization failed")
    assert sink.stop(10) == 0
    sink = guarded.rig.start("db_sink", ready=False, DB_SINK_GROUP="alerter", **guarded.environment("db_sink"))
    reported = re.compile(r"Group authorization failed\..*group='alerter'").search
    until(lambda: reported(guarded.rig.log("db_sink")), what="a line on the group")
    assert sink.stop(10) == 0


def operate(guarded: Guarded, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What fraudctl says to an operator."""
    environment = guarded.rig.environment | guarded.environment("operator") | environment
    return call(*arguments, cwd=guarded.rig.directory, environment=environment)


def test_a_group_that_is_hidden_hides_no_other(guarded: Guarded) -> None:
    (describe,) = [acl for acl in rows("operator") if str(acl) == "operator: Describe Group alerter"]
    guarded.forbid(describe)

    report = json.loads(operate(guarded, "status", "--json").stdout)

    (line,) = [line for line in report["problems"] if "uthorization failed" in line]
    assert line.startswith("Kafka: alerter: ")
    assert [reader["group"] for reader in report["readers"]] == ["predictor", "alerter-webhook", "db_sink"]
    assert len(report["topics"]) == 4


def test_topics_that_are_hidden_are_not_called_missing(guarded: Guarded) -> None:
    for acl in rows("operator"):
        if acl.resource == "Topic":
            guarded.forbid(acl)

    report = json.loads(operate(guarded, "status", "--json").stdout)
    tail = operate(guarded, "tail", "topic_1")

    for name in ("topic_1", "topic_1.dlq", "topic_2", "topic_2.dlq"):
        (line,) = [line for line in report["problems"] if f" {name}: " in line]
        assert re.fullmatch(rf"Kafka: {name}: .*Topic authorization failed", line)
    assert len(report["readers"]) == 4
    assert tail.returncode == 2
    assert re.fullmatch(r"fraudctl: Kafka: topic_1: .*Topic authorization failed\n", tail.stderr)


def test_an_operator_sees_what_is_missing(guarded: Guarded) -> None:
    def fraudctl(*arguments: str, topic_1: str = "topic_1") -> str:
        """All that it says if something is wrong."""
        done = operate(guarded, *arguments, TOPIC_1=topic_1)
        return done.stdout + done.stderr if done.returncode else ""

    guarded.rig.put("topic_1.dlq", [b"a letter"])
    tries = {
        "Create": lambda: fraudctl("topics", "create", topic_1="topic_new"),
        "Describe": lambda: fraudctl("status"),
        "DescribeConfigs": lambda: fraudctl("topics", "check", "--partitions", "1"),
        "Read": lambda: fraudctl("dead-letters", "list"),
        "Write": lambda: fraudctl("dead-letters", "replay", "--limit", "1"),
    }
    for acl in rows("operator"):
        guarded.forbid(acl)
        said = tries[acl.operation]()
        guarded.allow([acl])
        (line,) = [line for line in said.splitlines() if "uthorization failed" in line]
        assert acl.name in line, acl
    for attempt in tries.values():
        assert "uthorization failed" not in attempt()


def test_doctor_asks_for_the_operators_rights_and_no_more(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
        monkeypatch.setenv(name, value)  # whatever other tests have left there
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name, value in (guarded.rig.environment | guarded.environment("operator")).items():
        monkeypatch.setenv(name, value)

    def doctor(what: str) -> str:
        (line,) = [
            line for line in CliRunner().invoke(app, ["doctor"]).stdout.splitlines() if line[9:].startswith(f"{what}: ")
        ]
        return line

    assert doctor("topics").startswith("ok ")
    for acl in rows("operator"):
        guarded.forbid(acl)
        line = doctor("ACLs")
        guarded.allow([acl])
        wanted = rf"failed   ACLs: this login lacks {acl.operation} on [\w ]*\b{acl.name}[^;:]*\. Use "
        assert re.match(wanted, line), line
    assert doctor("ACLs").startswith("ok ")
    assert "a service that uses another login" in doctor("ACLs")


def test_losing_the_right_to_read_a_followed_topic_is_reported(guarded: Guarded) -> None:
    command = [sys.executable, "-m", "fraudctl", "tail", "topic_1", "--follow"]
    environment = guarded.rig.environment | guarded.environment("operator")
    out = guarded.rig.directory / "tail.out"
    (read,) = [acl for acl in rows("operator") if acl.operation == "Read"]
    with out.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, text=True, env=environment)

    def shown() -> str:
        guarded.rig.put("topic_1", [b"here it is"])
        return out.read_text()

    try:
        until(shown, what="a record")
        guarded.forbid(read)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 2
    assert re.fullmatch(r"fraudctl: Kafka: topic_1: .*Topic authorization failed\n", said), said
