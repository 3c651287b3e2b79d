"""Implements the design that this project replaced. The implementation has no unnecessary delays.

For each message, the program makes one DataFrame and one model call. Predictions are written without waiting for
acknowledgements. The client commits offsets automatically.
"""

import argparse
import json

import mlflow.sklearn
import pandas as pd
from confluent_kafka import Consumer, Producer


def main() -> None:
    """Process records until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["predict"])
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--model", help="Folder with a logged model.")
    parser.add_argument("--columns", help="Columns that the model expects, separated by commas.")
    arguments = parser.parse_args()
    consumer = Consumer(
        {"bootstrap.servers": arguments.bootstrap, "group.id": arguments.group, "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([arguments.source])
    predict(consumer, arguments)


def predict(consumer: Consumer, arguments: argparse.Namespace) -> None:
    """Read rows from the source topic, add a prediction to each row, and write the rows to the target topic."""
    model = mlflow.sklearn.load_model(arguments.model)
    columns = arguments.columns.split(",")
    producer = Producer({"bootstrap.servers": arguments.bootstrap})
    while True:
        message = consumer.poll(1.0)
        if message is None or message.error():
            continue
        row = json.loads(message.value())
        row["prediction"] = int(model.predict(pd.DataFrame([row])[columns])[0])
        producer.produce(arguments.target, value=json.dumps(row), key=message.key())
        producer.poll(0)


if __name__ == "__main__":
    main()
