"""A Faust agent that adds a field to every record."""

import argparse
import sys

import faust


def main() -> None:
    """Process records until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["loop"])
    for name in ("bootstrap", "group", "source", "target"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    app = faust.App(
        arguments.group,
        broker=f"kafka://{arguments.bootstrap}",
        consumer_auto_offset_reset="earliest",
        web_enabled=False,
    )
    source = app.topic(arguments.source, value_serializer="json", key_serializer="raw")
    target = app.topic(arguments.target, value_serializer="json", key_serializer="raw")

    @app.agent(source)
    async def add_field(stream):
        async for key, row in stream.items():
            row["prediction"] = 0
            await target.send(key=key, value=row)

    sys.argv = [sys.argv[0], "worker", "--loglevel", "warn"]
    app.main()


if __name__ == "__main__":
    main()
