"""The list of all services. Every other list of services is derived from this one, or a test compares the two.

This module imports only settings classes, so it loads fast. No service may import it, because the image of a service
contains no other service.
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
    """The names of the settings that configure a consumer group."""

    setting: str  # holds the name of the group
    topic: Topic  # holds the name of the topic that the group reads
    only_with: str | None = None  # the group has no members unless this setting is set


class Service(NamedTuple):
    """What the rest of the project needs to know about a service."""

    name: str  # also the name of its package, container and Prometheus job
    settings: type[ServiceSettings]
    groups: tuple[Group, ...] = ()
    writes: Topic | None = None
    needs: tuple[Need, ...] = ()  # the external systems that it uses besides Kafka
    extras: tuple[str, ...] = ()  # pyproject.toml extras that its image installs besides the base dependencies
    core: bool = True  # whether the demo and every deployment include it

    @property
    def module(self) -> str:
        """The module to run with `python -m`."""
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
    """Each consumer group and its service, in the order in which records pass through the services."""
    for service in SERVICES:
        for group in service.groups:
            yield service, group
