"""The design this project replaces, written fairly: one message, one model call, one INSERT at a time.

`predict` reads a transaction, makes a DataFrame of it, asks the model, and produces the answer without waiting for its
acknowledgement. `store` appends each prediction with pandas' `to_sql`. Both let the client commit by itself.
"""

import argparse
import json

import mlflow.sklearn
import pandas as pd
import sqlalchemy as sa
from confluent_kafka import Consumer, Producer


def main() -> None:
    """Work until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["predict", "store"])
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True, help="a topic, or a table")
    parser.add_argument("--model", help="a folder with a logged model")
    parser.add_argument("--columns", help="the model's, with commas between")
    parser.add_argument("--database")
    arguments = parser.parse_args()
    consumer = Consumer(
        {"bootstrap.servers": arguments.bootstrap, "group.id": arguments.group, "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([arguments.source])
    (predict if arguments.work == "predict" else store)(consumer, arguments)


def predict(consumer: Consumer, arguments: argparse.Namespace) -> None:
    """From one topic to the other."""
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


def store(consumer: Consumer, arguments: argparse.Namespace) -> None:
    """From a topic into a table."""
    engine = sa.create_engine(arguments.database)
    while True:
        message = consumer.poll(1.0)
        if message is None or message.error():
            continue
        frame = pd.DataFrame([json.loads(message.value())])
        frame.to_sql(arguments.target, engine, if_exists="append", index=False)


if __name__ == "__main__":
    main()
