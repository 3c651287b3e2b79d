"""The commands `topics create` and `topics check`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from fraudctl.cli import Commands, say

if TYPE_CHECKING:
    from shared.settings import ServiceSettings

commands = Commands(help="Create and check the topics and dead-letter topics.")


@commands.add("create", "topics create", "topics create --partitions 12 --replication 3")
def create(
    partitions: Annotated[int, typer.Option(metavar="N", min=1, help="Partitions for each new topic.")] = 6,
    replication: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Replicas of each new topic. Default: 3, or fewer if there are fewer brokers."
        ),
    ] = None,
) -> None:
    """Create missing topics, without changing existing topics."""
    from shared.kafka import topics
    from shared.settings import ServiceSettings, kafka_properties, load

    settings = load(ServiceSettings)
    properties = kafka_properties(settings)
    created = [
        name
        for names, letters in _topics(settings)
        for name in topics.create(properties, names, partitions=partitions, replication=replication, letters=letters)
    ]
    say(f"created: {', '.join(created)}" if created else "all topics exist")


@commands.add("check", "topics check")
def check(
    partitions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Minimum number of partitions of each topic.")
    ] = 6,
) -> None:
    """Show wrong topic settings and the commands that fix them.

    Changes nothing. Exits with 1 if something is wrong.
    """
    from shared.kafka import topics
    from shared.settings import ServiceSettings, kafka_properties, load

    settings = load(ServiceSettings)
    properties = kafka_properties(settings)
    problems = [
        problem
        for names, letters in _topics(settings)
        for problem in topics.check(properties, names, partitions=partitions, letters=letters)
    ]
    for line in problems or ["all topics are correct"]:
        say(line)
    raise typer.Exit(int(bool(problems)))


def _topics(settings: "ServiceSettings") -> Iterator[tuple[list[str], bool]]:
    """Yield pairs: a list of topic names, and whether these topics have dead-letter topics."""
    yield [settings.topic_1, settings.topic_2], True
    yield [settings.challenger_topic], False
