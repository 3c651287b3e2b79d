"""The producer on Apache Kafka: what the broker refuses is not lost."""

import pytest
from conftest import Rig, until

from fraudctl import topics
from sandbox.payments_api import PaymentsApi
from shared.records import read_topic_1

pytestmark = pytest.mark.kafka


def test_a_topic_that_is_missing_is_waited_for(apache_rig: Rig) -> None:
    absent = f"late-{apache_rig.topic_1}"
    with (apache_rig.directory / "client.properties").open("a") as properties:
        properties.write("topic.metadata.propagation.max.ms=500\n")  # how long a new topic may go unseen
    with PaymentsApi("--transactions", "50", "--rate", "0", log=apache_rig.directory / "api.log") as api:
        apache_rig.start(
            *("producer",), API_URL=api.url, TOPIC_1=absent, POLL_INTERVAL_SECONDS="0", BACKOFF_MAX_SECONDS="1"
        )
        until(lambda: "Unknown topic or partition" in apache_rig.log("producer"), what="the refusal in the log")
        topics.create(apache_rig.properties, [absent])

        messages = apache_rig.read(absent, 50, timeout_s=60, extra_s=2)

    identities = [row.identity for message in messages for row in read_topic_1(message.value()).transactions]
    assert len(identities) == len(set(identities)) == 50
