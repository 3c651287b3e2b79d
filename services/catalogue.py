"""The one list of services. Everything that lists them derives from it, or is checked against it by a test.

It imports settings classes and nothing heavy. No service imports it: an image holds its own service alone.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from services.alerter.settings import AlerterSettings
from services.db_sink.settings import SinkSettings
from services.predictor.settings import PredictorSettings
from services.producer.settings import ProducerSettings
from shared.settings import ServiceSettings

Topic = Literal["topic_1", "topic_2"]
Need = Literal["payments API", "registry", "database", "mail server"]


class Group(NamedTuple):
    """A consumer group, by the settings that name it and its topic."""

    setting: str
    topic: Topic
    only_with: str | None = None  # the setting without which nobody joins it


class Service(NamedTuple):
    """What the rest of the project needs to know about a service."""

    name: str  # of its package, its container and its Prometheus job
    settings: type[ServiceSettings]
    groups: tuple[Group, ...] = ()
    writes: Topic | None = None
    needs: tuple[Need, ...] = ()  # besides Kafka
    extras: tuple[str, ...] = ()  # of pyproject.toml, that its image installs; none: the dependencies of all services
    core: bool = True  # part of the flow: the demo starts it, and every deployment has it

    @property
    def module(self) -> str:
        """What `python -m` runs."""
        return f"services.{self.name}"


SERVICES = (
    Service(
        "producer",
        ProducerSettings,
        writes="topic_1",
        needs=("payments API",),
        extras=("producer",),
    ),
    Service(
        "predictor",
        PredictorSettings,
        groups=(Group("predictor_group", "topic_1"),),
        writes="topic_2",
        needs=("registry",),
        extras=("predictor", "compiled"),
    ),
    Service(
        "alerter",
        AlerterSettings,
        groups=(
            Group("alerter_group", "topic_2", only_with="smtp_host"),
            Group("webhook_group", "topic_2", only_with="webhook_url"),
        ),
        needs=("mail server",),
        extras=("alerter",),
    ),
    Service(
        "db_sink",
        SinkSettings,
        groups=(Group("db_sink_group", "topic_2"),),
        needs=("database",),
        extras=("db_sink",),
    ),
)
BY_NAME = {service.name: service for service in SERVICES}
CORE = tuple(service.name for service in SERVICES if service.core)


def readers() -> Iterator[tuple[Service, Group]]:
    """Every consumer group with its service, in the order of the flow."""
    for service in SERVICES:
        for group in service.groups:
            yield service, group
