"""fraudctl status: what an operator sees of a healthy system and of an unhealthy one."""

import ctypes
import json
import pkgutil
import re
import socket
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from confluent_kafka import Producer, TopicPartition, cimpl
from confluent_kafka.admin import AdminClient
from conftest import Rig, dead_letter_topic, make_transactions, until
from mlflow.models import infer_signature
from rich.console import Console
from sklearn.base import BaseEstimator, ClassifierMixin
from typer.testing import CliRunner, Result

from fraudctl.__main__ import app
from services.db_sink.table import migrate
from shared.dead_letters import refusal
from shared.kafka.clients import consumer
from shared.kafka.messages import NOTHING
from training import aliases
from training.aliases import Alias

pytestmark = pytest.mark.kafka

Status = Callable[..., Result]


@pytest.fixture
def stack(apache_rig: Rig, engine: sa.Engine, surroundings: dict[str, str]) -> Rig:
    migrate(engine)
    apache_rig.environment |= surroundings
    return apache_rig


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Status:
    monkeypatch.chdir(tmp_path)
    for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
        monkeypatch.setenv(name, value)  # whatever other tests have left there
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    def call(rig: Rig, *arguments: str, **environment: str) -> Result:
        for name, value in (rig.environment | environment).items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(app, ["status", *arguments])

    return call


def unhealthy(found: Result) -> list[str]:
    return [line for line in found.stdout.splitlines() if line.startswith("unhealthy")]


def test_services_that_are_down_are_missed_on_a_quiet_night_as_well(stack: Rig, status: Status) -> None:
    found = status(stack)

    assert found.exit_code == 1
    producer, *others = unhealthy(found)
    assert producer == f"unhealthy: producer: {stack.topic_1} is empty. Check that the producer runs."
    assert [line.split()[1] for line in others] == ["predictor", "alerter", "db_sink"]
    assert all("lag 0, and no member is running" in line for line in others)


def test_a_system_that_is_well(stack: Rig, status: Status) -> None:
    batch = make_transactions(300, fraud_rate=0.2)
    stack.put_transactions(batch)
    for name in ("predictor", "alerter", "db_sink"):
        stack.start(name, ready=False)

    def done() -> bool:
        report = json.loads(status(stack, "--json").stdout)
        return report["database"]["rows"] == len(batch) and not any(
            each["lag"] for reader in report["readers"] for each in reader["partitions"]
        )

    until(done, timeout_s=60, what="a database with all rows")
    found = status(stack)
    report = json.loads(status(stack, "--json").stdout)

    assert found.exit_code == 0
    assert found.stdout.startswith("healthy\n")
    assert "first at" in found.stdout
    assert report["healthy"] is True
    assert report["problems"] == []
    assert report["models"] == {"name": "fraud", "champion": "1", "challenger": None}
    assert {topic["name"]: topic["partitions"] for topic in report["topics"]} == {
        name: 6 for topic in (stack.topic_1, stack.topic_2) for name in (topic, dead_letter_topic(topic))
    }
    assert [reader["service"] for reader in report["readers"]] == ["predictor", "alerter", "db_sink"]
    assert {each["member"] for reader in report["readers"] for each in reader["partitions"]} == {"first at 127.0.0.1"}
    frauds = sa.create_engine(stack.environment["DATABASE_URL"]).connect()
    newest = frauds.execute(sa.text("SELECT max(unix_time) FROM transactions WHERE prediction = 1")).scalar_one()
    frauds.close()
    assert report["last_alert"]["unix_time"] == newest


def test_a_predictor_whose_model_hangs_is_named(stack: Rig, status: Status) -> None:
    champion = Alias(stack.environment["MLFLOW_TRACKING_URI"], "hangs", "champion")
    _register_a_model_that_hangs(champion)
    stack.environment["MODEL_NAME"] = champion.name
    stack.start("predictor")
    assert "has waited" not in status(stack, STALL_SECONDS="2").stdout
    (poisoned,) = make_transactions(1)
    poisoned.amt = 666.0
    stack.put_transactions([poisoned])
    time.sleep(2.1)  # the stall itself

    found = status(stack, STALL_SECONDS="2")

    problems = [line for line in unhealthy(found) if "no member is running" not in line]  # the others are not there
    group = stack.environment["PREDICTOR_GROUP"]
    assert found.exit_code == 1
    assert len(problems) == 1
    assert problems[0].startswith(
        f"unhealthy: predictor (group {group} on {stack.topic_1}): its oldest record has waited "
    )


def test_what_nobody_reads_and_what_is_away_is_named_and_hides_nothing(apache_rig: Rig, status: Status) -> None:
    apache_rig.put_transactions(make_transactions(1))

    found = status(apache_rig)

    group = apache_rig.environment["PREDICTOR_GROUP"]
    assert found.exit_code == 1
    lines = found.stdout.splitlines()
    reader = f"predictor (group {group} on {apache_rig.topic_1})"
    assert f"unhealthy: {reader}: lag 1, and no member is running. Start the predictor." in lines, found.stdout
    assert any(
        line.startswith(
            "unhealthy: Cannot reach MLflow at http://127.0.0.1:9: connection refused. Check that it runs, "
        )
        for line in lines
    )
    assert any(line.startswith("unhealthy: Cannot reach the database ") for line in lines)
    assert f"{apache_rig.topic_2}: 6 partitions" in lines


@pytest.fixture
def mock(environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[Callable[[str, int], None], Rig]]:
    """librdkafka's mock cluster, with a call that takes the leader of a partition away."""
    library = ctypes.CDLL(cimpl.__file__)
    library.rd_kafka_new.restype = library.rd_kafka_mock_cluster_new.restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    client = ctypes.c_void_p(library.rd_kafka_new(0, None, None, 0))
    cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(client, 1))
    properties = {"bootstrap.servers": library.rd_kafka_mock_cluster_bootstraps(cluster).decode()}
    Path(environment["CLIENT_PROPERTIES"]).write_text(f"bootstrap.servers={properties['bootstrap.servers']}\n")
    for topic in ("topic_1", "topic_2"):
        for name in (topic, dead_letter_topic(topic)):
            library.rd_kafka_mock_topic_create(cluster, name.encode(), 3, 1)

    def behead(topic: str, partition: int) -> None:
        library.rd_kafka_mock_partition_set_leader(cluster, topic.encode(), partition, -1)

    yield behead, Rig(tmp_path, properties, environment, "topic_1", "topic_2")
    library.rd_kafka_mock_cluster_destroy(cluster)
    library.rd_kafka_destroy(client)


def test_a_partition_without_a_leader_hides_nothing_of_the_others(
    mock: tuple[Callable[[str, int], None], Rig], status: Status
) -> None:
    behead, rig = mock
    behead("topic_1", 1)

    lines = status(rig).stdout.splitlines()

    assert "unhealthy: topic_1: no leader for partitions 1. Check that every broker runs." in lines, lines
    for topic in ("topic_1", "topic_1.dlq", "topic_2", "topic_2.dlq"):
        assert any(line.startswith(f"{topic}: 3 partitions") for line in lines), lines
    for group in ("predictor", "alerter", "db_sink"):  # such a broker cannot describe groups
        assert f"unhealthy: Kafka: {group}: Local: Required feature not supported by broker" in lines


def test_how_long_the_registry_is_waited_for_is_the_operators_choice(
    mock: tuple[Callable[[str, int], None], Rig], status: Status
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = status(mock[1], MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_TIMEOUT="1")

    assert "no complete response within 1 s. Check that it runs, and check MLFLOW_TRACKING_URI" in found.stdout.replace(
        "\n", ""
    )


def test_a_broker_that_does_not_answer_is_named_once(rig: Rig, status: Status) -> None:
    Path(rig.environment["CLIENT_PROPERTIES"]).write_text("bootstrap.servers=127.0.0.1:9\n")

    (line,) = [line for line in unhealthy(status(rig)) if "Kafka" in line]

    assert line.startswith("unhealthy: Kafka at 127.0.0.1:9: ")


def test_a_producer_that_brings_nothing_new_is_missed(stack: Rig, status: Status) -> None:
    producer = Producer(dict(stack.properties))
    now_ms = int(time.time() * 1000)
    for age_min in (30, 20):
        producer.produce(stack.topic_1, b"x", partition=age_min % 3, timestamp=now_ms - age_min * 60_000)
    producer.flush(20)

    found = status(stack)

    assert unhealthy(found)[0] == (
        f"unhealthy: producer: no new record on {stack.topic_1} for 20 min. Check that the producer runs."
    )
    stack.put_transactions(make_transactions(1))
    assert "no new record" not in status(stack).stdout


def test_marks_of_transactions_are_no_lag(stack: Rig, status: Status) -> None:
    producer = Producer({**stack.properties, "transactional.id": f"test-{time.time_ns()}"})
    producer.init_transactions(20)
    for value, headers, commit in ((b"aborted", [], False), (None, NOTHING, True)):
        producer.begin_transaction()
        producer.produce(stack.topic_1, value, headers=headers, partition=0)
        producer.flush(20)
        producer.commit_transaction(20) if commit else producer.abort_transaction(20)

    found = status(stack, "--json")

    predictor = json.loads(found.stdout)["readers"][0]
    assert predictor["service"] == "predictor"
    assert not any(each["lag"] for each in predictor["partitions"])


def test_records_deleted_unread_and_a_topic_that_is_shorter_than_before_are_named(stack: Rig, status: Status) -> None:
    producer = Producer(dict(stack.properties))
    for partition in [0] * 20 + [1] * 3:
        producer.produce(stack.topic_2, b"x", partition=partition)
    assert producer.flush(20) == 0
    for group, offsets in (("ALERTER_GROUP", (5, 2)), ("DB_SINK_GROUP", (20, 4))):
        client = consumer(stack.properties, group=stack.environment[group])
        client.commit(offsets=[TopicPartition(stack.topic_2, *each) for each in enumerate(offsets)], asynchronous=False)
        client.close()
    admin = AdminClient({**stack.properties, "log_level": 0})
    (deleted,) = admin.delete_records([TopicPartition(stack.topic_2, 0, 12)]).values()
    deleted.result(20)

    found = unhealthy(status(stack))

    (alerter,) = [line for line in found if "deleted before they were read" in line]
    assert "alerter" in alerter
    assert "7 records" in alerter
    (sink,) = [line for line in found if "beyond the end of partitions 1." in line]
    assert "db_sink" in sink


def test_dead_letters_are_counted_until_they_are_put_back_and_are_not_unhealthy(stack: Rig, status: Status) -> None:
    producer = Producer(dict(stack.properties))
    letters, began = dead_letter_topic(stack.topic_1), time.monotonic()
    for _ in range(3):
        producer.produce(letters, b"x", headers=refusal(stack.topic_1, "not JSON", by="predictor"), partition=0)
    producer.produce(letters, None, headers=[("dlq-replayed", b"0:1")], partition=0)
    producer.flush(20)
    stack.put_transactions(make_transactions(1))

    found = status(stack)

    assert all("no member is running" in line for line in unhealthy(found))
    shown = re.search(rf"^{letters}: 6 partitions, 2 dead letters, newest record (\d+) s old$", found.stdout, re.M)
    assert shown
    assert int(shown[1]) <= round(time.monotonic() - began)


def test_no_champion_no_schema_and_no_topic_are_named(stack: Rig, engine: sa.Engine, status: Status) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE alembic_version"))

    found = status(stack, MODEL_NAME="nobody", TOPIC_2="nowhere")

    assert found.exit_code == 1
    assert (
        "unhealthy: no version of nobody has the alias champion. Run `fraudctl train` or `fraudctl promote VERSION`."
        in found.stdout
    )
    assert "unhealthy: database: the schema version is none, the newest is 0003" in found.stdout
    assert "unhealthy: nowhere does not exist. Run `fraudctl topics create`." in found.stdout


@pytest.mark.parametrize("asked_first", ["fraudctl.database.schema", "fraudctl.status._database"])
def test_a_lock_on_the_table_is_not_waited_for_without_end(
    stack: Rig, engine: sa.Engine, status: Status, monkeypatch: pytest.MonkeyPatch, asked_first: str
) -> None:
    ask = pkgutil.resolve_name(asked_first)
    holder = engine.connect()

    def ask_and_lock(of: object) -> object:
        answer = ask(of)
        holder.execute(sa.text("SET idle_in_transaction_session_timeout = '30s'"))
        holder.execute(sa.text("LOCK TABLE transactions IN ACCESS EXCLUSIVE MODE"))
        return answer

    monkeypatch.setattr(asked_first, ask_and_lock)
    monkeypatch.setattr("fraudctl.status._TIMEOUT_S", 5.0)
    try:
        found = status(stack)
    finally:
        holder.invalidate()
        holder.close()

    assert found.exit_code == 1
    assert [line for line in unhealthy(found) if "database" in line] == [
        f"unhealthy: The database 127.0.0.1:{engine.url.port}/{engine.url.database} did not respond within 5 s."
        " Look for a lock in pg_stat_activity, or for a slow disk."
    ]


def test_it_is_watched_until_ctrl_c(stack: Rig, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, screens = [], []
    terminal = Console(file=StringIO(), force_terminal=True, width=200, height=24)  # lower than all that there is

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        screens.append(terminal.file.getvalue())  # type: ignore[attr-defined]
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("fraudctl.commands.operations.time", SimpleNamespace(sleep=pause))
    monkeypatch.setattr("fraudctl.commands.operations.console", terminal)

    watched = status(stack, "--watch")

    assert watched.exit_code == 1
    assert screens[0].count("no member is running") == 3
    assert f"{stack.topic_2}: 6 partitions" not in screens[0]  # for which there is no room
    assert pauses == [2.0, 2.0, 2.0]
    assert status(stack, "--watch", "--json").exit_code == 2


def _register_a_model_that_hangs(champion: Alias) -> None:
    class Hanging(ClassifierMixin, BaseEstimator):
        classes_ = np.array([0, 1])

        def fit(self, *_: object) -> "Hanging":
            return self

        def predict_proba(self, rows: object) -> np.ndarray:
            if (rows["amt"] == 666.0).any():  # type: ignore[index]
                import time

                time.sleep(3600)
            return np.tile([0.9, 0.1], (len(rows), 1))  # type: ignore[arg-type]

        def predict(self, rows: object) -> np.ndarray:
            return self.predict_proba(rows)[:, 1].round().astype(int)

    mlflow.set_tracking_uri(champion.tracking_uri)
    mlflow.set_experiment("hangs")
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            Hanging(),
            name="model",
            signature=infer_signature(pd.DataFrame({"amt": [1.0]})),
            registered_model_name=champion.name,
            pip_requirements=[],
            serialization_format="cloudpickle",
        )
    aliases.move(champion, "1")
