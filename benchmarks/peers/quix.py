"""A Quix Streams application that adds a field to every record: a constant (`loop`) or a prediction (`predict`)."""

import argparse
from collections.abc import Callable

import mlflow.sklearn
import pandas as pd
from quixstreams import Application


def main() -> None:
    """Process records until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["loop", "predict"])
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--model", help="Folder with a logged model.")
    parser.add_argument("--columns", help="Columns that the model expects, separated by commas.")
    arguments = parser.parse_args()
    application = Application(
        broker_address=arguments.bootstrap,
        consumer_group=arguments.group,
        auto_offset_reset="earliest",
        auto_create_topics=False,
        loglevel="WARNING",
    )
    source = application.topic(arguments.source, value_deserializer="json", key_deserializer="bytes")
    target = application.topic(arguments.target, value_serializer="json", key_serializer="bytes")
    add = add_field if arguments.work == "loop" else asker(arguments)
    application.dataframe(source).apply(add).to_topic(target)
    application.run()


def add_field(row: dict[str, object]) -> dict[str, object]:
    """Add a constant field to the record."""
    row["prediction"] = 0
    return row


def asker(arguments: argparse.Namespace) -> Callable[[dict[str, object]], dict[str, object]]:
    """Return a function that adds the model's prediction to a row."""
    model = mlflow.sklearn.load_model(arguments.model)
    columns = arguments.columns.split(",")

    def ask(row: dict[str, object]) -> dict[str, object]:
        row["prediction"] = int(model.predict(pd.DataFrame([row])[columns])[0])
        return row

    return ask


if __name__ == "__main__":
    main()
