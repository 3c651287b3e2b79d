"""Asks models in this process as a model's own process does, which starts none."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from mlflow.models import infer_signature

from services.predictor.host import Load, Scored, Served, serve
from services.predictor.model import recorded
from shared.records import FEATURES, REFERENCE, Transaction, encode_transaction

TYPES = {name: type(getattr(REFERENCE, name)).__name__ for name in FEATURES if name != "is_fraud"}

Answer = tuple[int, float | None]


def request(*, threshold: float | None = None, compiled: bool = False, folder: Path | None = None) -> Load:
    """The request to load a model."""
    rows = b"[%b]" % b",".join([encode_transaction(REFERENCE), *recorded()])
    return Load(str(folder), TYPES, rows, threshold, compiled, 60.0, 2048)


def made(
    estimator: Any, columns: Sequence[str] | None = None, *, threshold: float | None = None, compiled: bool = False
) -> tuple[Served, str]:
    """The estimator as it is served, if its signature has these columns, and why it is not compiled."""
    signature = infer_signature(frame([REFERENCE])[list(columns)]) if columns else None
    return serve(estimator, signature, request(threshold=threshold, compiled=compiled))


def frame(transactions: Sequence[Transaction]) -> pd.DataFrame:
    """The transactions as a DataFrame, as somebody has them who trains a model."""
    return pd.DataFrame(list(map(msgspec.structs.asdict, transactions)), columns=list(FEATURES))


def values(transactions: Sequence[Transaction]) -> list[bytes]:
    """The transactions as they are on topic_1."""
    return list(map(encode_transaction, transactions))


def answers(served: Served, transactions: Sequence[Transaction]) -> list[Answer]:
    """What it answers: a label and a probability each. Raises whatever the model raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a model's own process
        found = served.score(b"[%b]" % b",".join(values(transactions)))
    assert not found.faults
    return unpacked(found)


def unpacked(found: Scored) -> list[Answer]:
    """The labels and probabilities."""
    chances: list[float | None] = [None] * len(found.labels)
    if found.probabilities is not None:
        chances = list(np.frombuffer(found.probabilities).tolist())
    return list(zip(found.labels, chances, strict=True))


def faults(served: Served, transactions: Sequence[Transaction]) -> Mapping[int, str]:
    """Why it cannot be given some of the transactions."""
    return served.score(b"[%b]" % b",".join(values(transactions))).faults
