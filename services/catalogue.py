"""Lists all services. Every other list of services is derived from this list, or a test compares it with this list.

This module imports only settings classes, so it loads fast. No service may import this module, because the image of a
service does not contain the other services.
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

    setting: str  # the setting with the group's name
    topic: Topic  # the setting with the name of the topic that the group reads
    only_with: str | None = None  # a setting without which the group has no members


class Service(NamedTuple):
    """Describes a service to the rest of the project."""

    name: str  # the service's package, container and Prometheus job have the same name
    settings: type[ServiceSettings]
    groups: tuple[Group, ...] = ()
    writes: Topic | None = None
    needs: tuple[Need, ...] = ()  # the external systems, besides Kafka, that the service uses
    extras: tuple[str, ...] = ()  # extras of pyproject.toml that the service's image installs
    core: bool = True  # whether the demo and every deployment include the service

    @property
    def module(self) -> str:
        """The module that `python -m` runs to start the service."""
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
    """Yield each consumer group with its service, in the order in which records pass through the services."""
    for service in SERVICES:
        for group in service.groups:
            yield service, group
