"""docs/operations.md: each symptom is brought about, and its commands show what it says they show."""

import re
import shlex
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from conftest import Rig, dead_letter_topic, make_transactions, until
from typer.testing import CliRunner

from fraudctl.__main__ import app
from services.db_sink.table import migrate
from shared.dead_letters import refusal
from shared.kafka.clients import consumer
from shared.records import encode_prediction, encode_transaction

pytestmark = [pytest.mark.kafka, pytest.mark.xdist_group("replays")]  # a replay fences any other on the broker

RUNBOOK = Path(__file__).parents[2] / "docs" / "operations.md"
SECTIONS = dict(section.split("\n", 1) for section in RUNBOOK.read_text().split("\n## ")[1:])

Runbook = Callable[..., str]


@pytest.fixture
def stack(apache_rig: Rig, engine: sa.Engine, surroundings: dict[str, str]) -> Rig:
    migrate(engine)
    apache_rig.environment |= surroundings | {
        "STALL_SECONDS": "1",
        "BACKOFF_MAX_SECONDS": "1",
    }
    return apache_rig


@pytest.fixture
def runbook(stack: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runbook:
    """What all the commands of a section print, fraudctl's, in their order."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
        monkeypatch.setenv(name, value)  # whatever other tests have left there
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    def run(symptom: str) -> str:
        for name, value in stack.environment.items():
            monkeypatch.setenv(name, value)
        commands = re.findall(r"^\$ fraudctl (.+)$", SECTIONS[symptom], re.MULTILINE)
        assert commands
        own = (command.replace("topic_1", stack.topic_1) for command in commands)
        return "".join(CliRunner().invoke(app, shlex.split(command)).output for command in own)

    return run


def put_a_fraud(stack: Rig) -> None:
    (transaction,) = make_transactions(1)
    stack.put(stack.topic_2, [encode_prediction(encode_transaction(transaction), 1)], key=transaction.key)


def test_mails_stopped(stack: Rig, runbook: Runbook) -> None:
    stack.environment["SMTP_PORT"] = "9"
    alerter = stack.start("alerter")
    put_a_fraud(stack)
    until(lambda: alerter.said("event='outage'"), what="an alerter that waits")
    time.sleep(1.1)  # the stall itself

    shown = runbook("Mails stopped")

    group = stack.environment["ALERTER_GROUP"]
    assert f"unhealthy: alerter (group {group} on {stack.topic_2}): its oldest record has waited" in shown
    assert "failed   SMTP: cannot reach the mail server 127.0.0.1:9: " in shown
    assert "cannot reach the mail server 127.0.0.1:9: connection refused. " in shown


def test_lag_grows(stack: Rig, runbook: Runbook) -> None:
    stack.put_transactions(make_transactions(20))

    shown = runbook("Lag grows")

    group = stack.environment["PREDICTOR_GROUP"]
    assert f"unhealthy: predictor (group {group} on {stack.topic_1}): lag 20, and no member is running" in shown


def test_dead_letters_appear(stack: Rig, runbook: Runbook) -> None:
    producer = Producer(dict(stack.properties))
    for reason in ("empty value", "Expected `int` - at `$.zip`", "empty value"):
        headers = refusal(stack.topic_1, reason, by="predictor")
        producer.produce(dead_letter_topic(stack.topic_1), b"{}", headers=headers)
    producer.flush(20)

    shown = runbook("Dead letters appear")

    assert "      2  empty value\n" in shown
    assert "  dlq-reason: Expected `int` - at `$.zip`\n" in shown


def test_records_were_deleted_unread(stack: Rig) -> None:
    producer = Producer(dict(stack.properties))
    for _ in range(20):
        producer.produce(stack.topic_2, b"x", partition=0)
    assert producer.flush(20) == 0
    client = consumer(stack.properties, group=stack.environment["DB_SINK_GROUP"])
    client.commit(offsets=[TopicPartition(stack.topic_2, 0, 5)], asynchronous=False)
    client.close()
    admin = AdminClient({**stack.properties, "log_level": 0})
    (deleted,) = admin.delete_records([TopicPartition(stack.topic_2, 0, 12)]).values()
    deleted.result(20)

    sink = stack.start("db_sink")

    until(lambda: sink.said("event='records_deleted_unread'"), what="the line that the runbook names")
    assert re.search(r"event='records_deleted_unread' .*partition=0 records=7\b", stack.log("db_sink"))


def test_a_topic_was_made_again(stack: Rig) -> None:
    sink = stack.start("db_sink")
    time.sleep(4)  # the db_sink knows the topic's ID
    admin = AdminClient({**stack.properties, "log_level": 0})
    admin.delete_topics([stack.topic_2])[stack.topic_2].result(20)

    def made() -> bool:
        return admin.create_topics([NewTopic(stack.topic_2, 6, 1)])[stack.topic_2].exception(20) is None

    until(made, what="the topic")

    until(lambda: sink.said("event='topic_recreated'"), what="the line that the runbook names")
    assert re.search(r"event='topic_recreated' .*read_again_at_most=0\b", stack.log("db_sink"))


def test_predictor_not_ready(stack: Rig, runbook: Runbook) -> None:
    stack.environment["MODEL_NAME"] = "nobody"
    predictor = stack.start("predictor", ready=False)
    until(lambda: predictor.said("has the alias champion"), what="a predictor that waits")

    shown = runbook("Predictor not ready")

    assert "failed   champion: no version of nobody has the alias champion" in shown


def test_database_full_or_away(stack: Rig, engine: sa.Engine, runbook: Runbook) -> None:
    with engine.begin() as connection:  # in the words of a server whose disk is full: it still lets read
        connection.execute(
            sa.text(
                "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION"
                " 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$"
            )
        )
        connection.execute(
            sa.text("CREATE TRIGGER full_disk BEFORE INSERT ON transactions EXECUTE FUNCTION full_disk()")
        )
    sink = stack.start("db_sink", ready=False)
    put_a_fraud(stack)
    until(lambda: sink.said("DiskFull: could not extend file: No space left"), what="a db_sink that waits")
    time.sleep(1.1)  # the stall itself

    shown = runbook("Database full, or away")

    group = stack.environment["DB_SINK_GROUP"]
    assert "database: 0 rows" in shown
    assert f"unhealthy: db_sink (group {group} on {stack.topic_2}): " in shown


def test_a_service_is_down(stack: Rig, runbook: Runbook) -> None:
    sink = stack.start("db_sink")
    sink.kill()
    put_a_fraud(stack)

    reader = f"db_sink (group {stack.environment['DB_SINK_GROUP']} on {stack.topic_2})"
    unhealthy = f"unhealthy: {reader}: lag 1, and no member is running. Start the db_sink."
    until(lambda: unhealthy in runbook("A service is down"), what="a group without members")


def test_a_service_is_stalled(stack: Rig, runbook: Runbook) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        stack.environment["SMTP_PORT"] = str(silent.getsockname()[1])
        alerter = stack.start("alerter")
        put_a_fraud(stack)
        until(lambda: alerter.said("event='stalled'"), what="a stall in the log")

        shown = runbook("A service is stalled")

    assert f"unhealthy: alerter (group {stack.environment['ALERTER_GROUP']} on {stack.topic_2}): its oldest" in shown
    assert "first at" in shown  # it holds its partitions


def test_an_outage_lasts(stack: Rig, runbook: Runbook) -> None:
    stack.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"

    assert "failed   MLflow: " in runbook("An outage lasts")


def test_the_model_is_too_old(runbook: Runbook) -> None:
    assert "model fraud: champion 1, challenger none" in runbook("The model is too old")


def test_live_data_drift(stack: Rig, runbook: Runbook) -> None:
    stack.put_transactions(make_transactions(20))

    assert runbook("Live data drift").count('"category": ') == 20


def test_no_transactions_come(stack: Rig, runbook: Runbook) -> None:
    transactions = make_transactions(3)
    stack.put_transactions(transactions)

    shown = runbook("No transactions come")

    assert re.search(rf"^{stack.topic_1}: 6 partitions, newest record \d+ s old$", shown, re.MULTILINE)
    assert "failed   API contract: cannot fetch transactions from http://127.0.0.1:9/current-transactions: " in shown
    assert len(re.findall(rf"^{stack.topic_1}:\d:\d, 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC$", shown, re.MULTILINE)) == 1


def test_a_setting_was_changed_or_a_cluster_is_new(stack: Rig, runbook: Runbook) -> None:
    stack.environment |= {"TOPIC_1": f"new-{stack.topic_1}", "TOPIC_2": f"new-{stack.topic_2}"}

    shown = runbook("A setting was changed, or a cluster is new")

    assert f"created: new-{stack.topic_1}" in shown.replace("\n", "")
    assert "all topics are correct" in shown
    assert "ok       topics: " in shown


def test_every_symptom_is_tried() -> None:
    _, *symptoms = SECTIONS  # the first is none

    for symptom in symptoms:
        assert re.sub(r"\W+", "_", f"test {symptom.lower()}") in globals()
