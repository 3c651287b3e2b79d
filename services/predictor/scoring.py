"""Scores a batch: turns messages from topic_1 into predictions and dead letters."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

from confluent_kafka import Message

from services.predictor.model import Model, Prediction, recorded
from shared.dead_letters import Limit, dead_letter
from shared.errors import Poison
from shared.kafka.messages import Record, coordinates, says_nothing
from shared.provenance import Provenance, to_headers
from shared.records import REFERENCE, Transaction, encode_prediction, encode_transaction, read_topic_1
from shared.stream.flight import Outcome

Score = Callable[[Sequence[Transaction]], tuple[Model, Sequence[Prediction | Poison]]]
"""Scores transactions. Returns the model that has scored them, and one result each, in order."""


class Seen(NamedTuple):
    """What drift monitoring needs to know about a scored transaction."""

    transaction: Transaction
    fraud: bool
    in_milliseconds: bool  # whether the source gave unix_time in milliseconds instead of seconds


class Predicted(NamedTuple):
    """The outcome of a batch, and the transactions that were scored."""

    outcome: Outcome
    seen: list[Seen]


def predict(
    score: Score, messages: Sequence[Message], *, topic: str, group: str, now_ms: int, limit: Limit
) -> Predicted:
    """Make a prediction for every valid transaction of the batch, and a dead letter for every message with a bad row.

    The predictions are records to write to `topic`. Raises Outage if scoring fails because of the model, not because of
    the rows.
    """
    transactions: list[Transaction] = []
    in_milliseconds: list[bool] = []
    values: list[bytes] = []
    sources: list[int] = []  # for each transaction, the index of its message
    faults: defaultdict[int, list[str]] = defaultdict(list)
    for number, message in enumerate(messages):
        if says_nothing(message):
            continue
        try:
            rows = read_topic_1(message.value())
        except Poison as poison:
            faults[number].append(str(poison))
            continue
        transactions += rows.transactions
        values += [rows.canonical] if rows.canonical else map(encode_transaction, rows.transactions)
        sources += [number] * len(rows.transactions)
        in_milliseconds += [rows.in_milliseconds > 0] * len(rows.transactions)
        for row in rows.bad:
            faults[number].append(row.reason)
    model, results = score(transactions)
    limit.check(results, reference=lambda: model.check([REFERENCE, *recorded()]))
    scored: list[_Scored] = []
    seen = []
    for number, transaction, value, milliseconds, result in zip(
        sources, transactions, values, in_milliseconds, results, strict=True
    ):
        if isinstance(result, Poison):
            faults[number].append(str(result))
        else:
            scored.append(_Scored(messages[number], value, transaction.key, result))
            seen.append(Seen(transaction, result.label == 1, milliseconds))

    def encode(one: _Scored) -> Record:
        message, value, key, result = one
        _, partition, offset = coordinates(message)
        provenance = Provenance(model.name, model.version, result.probability, now_ms, partition, offset)
        return Record(topic, encode_prediction(value, result.label), key, to_headers(provenance))

    dead = [dead_letter(messages[number], "; ".join(reasons), group=group) for number, reasons in faults.items()]
    return Predicted(Outcome(len(messages), _Encoded(encode, scored), dead), seen)


class _Scored(NamedTuple):
    message: Message
    value: bytes  # of the transaction, in canonical form
    key: bytes
    result: Prediction


class _Encoded(Sequence[Record]):
    """Records that are encoded when they are delivered.

    The thread that delivers one batch thus encodes it while the thread that scores waits for the model's process, which
    scores the next batch.
    """

    def __init__(self, encode: Callable[[_Scored], Record], scored: Sequence[_Scored]) -> None:
        self._encode = encode
        self._scored = scored

    def __len__(self) -> int:
        return len(self._scored)

    def __iter__(self) -> Iterator[Record]:
        return map(self._encode, self._scored)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        return list(self)[index]
