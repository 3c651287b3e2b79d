"""Copies every record unchanged, and uses only the Kafka clients. No loop in Python can be faster."""

import argparse
from threading import Event

from shared.kafka.clients import consumer, producer
from shared.kafka.messages import Record
from shared.stream.delivery import enqueue


def main() -> None:
    """Process records until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bootstrap", "group", "source", "target"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    properties = {"bootstrap.servers": arguments.bootstrap}
    reader, writer = consumer(properties, group=arguments.group), producer(properties)
    reader.subscribe([arguments.source])
    while True:
        messages = reader.consume(1000, 0.1)
        enqueue(writer, [Record(arguments.target, each.value(), each.key(), []) for each in messages], Event())
        writer.poll(0)


if __name__ == "__main__":
    main()
