"""The broker behind TLS and logins, one for each of the files here."""

import os
from collections.abc import Iterator

import pytest
from secured import SecuredKafka

from sandbox.apache import missing

USERS = ("producer", "predictor", "alerter", "db_sink", "operator")


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """A real Apache Kafka with a login for each service. Where it cannot run the test is skipped, in CI failed."""
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(f"Apache Kafka must run in CI: {reason}")
        pytest.skip(reason)
    with SecuredKafka(tmp_path_factory.mktemp("secured"), users=USERS) as broker:
        yield broker
