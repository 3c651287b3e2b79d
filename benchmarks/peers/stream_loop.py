"""Adds a field to every record, using this project's stream loop and at-least-once delivery."""

import argparse
from collections.abc import Sequence
from threading import Event

from confluent_kafka import Message

from shared.kafka.clients import consumer
from shared.kafka.messages import Record
from shared.records import encode_prediction, read_topic_1
from shared.settings import StreamSettings, load
from shared.stream.delivery import AtLeastOnce
from shared.stream.flight import Outcome
from shared.stream.loop import Stream


def main() -> None:
    """Process records until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bootstrap", "group", "source", "target"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    properties = {"bootstrap.servers": arguments.bootstrap}
    shutdown = Event()

    def add_field(messages: Sequence[Message]) -> Outcome:
        records = []
        for message in messages:
            value = message.value()
            transaction = read_topic_1(value).transactions[0]
            records.append(Record(arguments.target, encode_prediction(value, 0), transaction.key, []))
        return Outcome(len(messages), records)

    Stream(
        make_consumer=lambda _: consumer(properties, group=arguments.group),
        group=arguments.group,
        topic=arguments.source,
        delivery=AtLeastOnce(properties=properties, shutdown=shutdown),
        settings=load(StreamSettings),
        shutdown=shutdown,
    ).run(add_field, ahead=True)


if __name__ == "__main__":
    main()
