"""fraudctl topics create and check, on Apache Kafka."""

from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic
from conftest import Rig, until
from typer.testing import CliRunner, Result

from fraudctl.__main__ import app

pytestmark = pytest.mark.kafka

Fraudctl = Callable[..., Result]


@pytest.fixture
def fraudctl(apache_rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fraudctl:
    """On topics of this test's own, of which there is none yet."""
    monkeypatch.chdir(tmp_path)
    for name, value in apache_rig.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOPIC_1", f"orders-{apache_rig.topic_1}")
    monkeypatch.setenv("TOPIC_2", f"verdicts-{apache_rig.topic_1}")
    return lambda *arguments: CliRunner().invoke(app, ["topics", *arguments])


@pytest.fixture
def client(apache_rig: Rig) -> AdminClient:
    return AdminClient(dict(apache_rig.properties))


def alter(client: AdminClient, topic: str, **settings: str) -> None:
    entries = [
        ConfigEntry(name.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
        for name, value in settings.items()
    ]
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
    client.incremental_alter_configs([resource])[resource].result()


def test_check_finds_nothing_wrong_with_what_create_makes(fraudctl: Fraudctl) -> None:
    before = fraudctl("check")
    created = fraudctl("create")
    again = fraudctl("create")
    after = fraudctl("check")

    assert before.exit_code == 1
    assert before.stdout.count("missing, or hidden by ACLs. Run fraudctl topics create") == 5
    assert created.exit_code == again.exit_code == after.exit_code == 0
    assert again.stdout == "all topics exist\n"
    assert after.stdout == "all topics are correct\n"


@pytest.mark.parametrize(
    ("suffix", "settings", "named"),
    [
        ("", {"cleanup_policy": "compact"}, "cleanup.policy is compact"),
        ("", {"retention_ms": "3600000"}, "retention.ms is 3600000"),
        ("", {"compression_type": "uncompressed"}, "compression.type is uncompressed"),
        ("", {"min_insync_replicas": "2"}, "min.insync.replicas is 2"),
        (".dlq", {"max_message_bytes": "1048588"}, "max.message.bytes is 1048588"),
        (".dlq", {"retention_ms": "604800000"}, "retention.ms is 604800000"),
    ],
)
def test_check_names_each_difference_and_the_command_that_fixes_it(
    fraudctl: Fraudctl, client: AdminClient, apache_rig: Rig, suffix: str, settings: dict[str, str], named: str
) -> None:
    topic = f"orders-{apache_rig.topic_1}{suffix}"
    fraudctl("create", "--partitions", "1")
    alter(client, topic, **settings)

    until(lambda: fraudctl("check", "--partitions", "1").exit_code == 1, what="a difference")
    checked = fraudctl("check", "--partitions", "1")
    (line,) = checked.stdout.splitlines()
    assert line.startswith(f"{topic}: {named}, ")
    setting, value = line.rpartition(" ")[2].split("=")
    alter(client, topic, **{setting.replace(".", "_"): value})
    until(lambda: fraudctl("check", "--partitions", "1").exit_code == 0, what="the difference to be fixed")


def test_a_topic_that_is_there_is_neither_grown_nor_changed(
    fraudctl: Fraudctl, client: AdminClient, apache_rig: Rig
) -> None:
    topic = f"orders-{apache_rig.topic_1}"
    small = NewTopic(topic, num_partitions=2, replication_factor=1, config={"retention.ms": "-1"})
    client.create_topics([small])[topic].result()
    until(lambda: client.list_topics(topic).topics[topic].partitions, what="the topic")

    created = fraudctl("create", "--partitions", "6")
    checked = fraudctl("check")

    assert created.exit_code == 0
    assert f"{topic}," not in created.stdout
    assert len(client.list_topics(topic).topics[topic].partitions) == 2
    assert checked.exit_code == 1
    (line,) = checked.stdout.splitlines()
    assert line.startswith(f"{topic}: 2 partitions, not 6. Adding partitions moves cards to other partitions")


def test_more_copies_than_brokers_are_refused_in_one_line(fraudctl: Fraudctl) -> None:
    refused = fraudctl("create", "--replication", "3")

    assert refused.exit_code == 2
    assert "replication factor" in refused.stderr.lower()
    assert refused.stderr.count("\n") == 1
