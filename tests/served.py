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
from services.predictor.hosted import Allowance
from services.predictor.model import load_request, named_columns
from shared.records import FEATURES, REFERENCE, Transaction

TYPES = {name: type(getattr(REFERENCE, name)).__name__ for name in FEATURES if name != "is_fraud"}

Answer = tuple[int, float | None]


def request(*, threshold: float | None = None, compiled: bool = False, folder: Path | None = None) -> Load:
    """The request to load a model."""
    return load_request(folder or Path(), threshold=threshold, compiled=compiled, allowance=Allowance())


def made(
    estimator: Any, names: Sequence[str] | None = None, *, threshold: float | None = None, compiled: bool = False
) -> tuple[Served, str]:
    """The estimator as it is served, if its signature has these columns, and why it is not compiled."""
    signature = infer_signature(frame([REFERENCE])[list(names)]) if names else None
    return serve(estimator, signature, request(threshold=threshold, compiled=compiled))


def frame(transactions: Sequence[Transaction]) -> pd.DataFrame:
    """The transactions as a DataFrame, as somebody has them who trains a model."""
    return pd.DataFrame(list(map(msgspec.structs.asdict, transactions)), columns=list(FEATURES))


def answers(served: Served, transactions: Sequence[Transaction]) -> list[Answer]:
    """What it answers: a label and a probability each. Raises whatever the model raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a model's own process
        found = served.score(_given(served, transactions))
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
    return served.score(_given(served, transactions)).faults


def _given(served: Served, transactions: Sequence[Transaction]) -> list[list[Any]]:
    all_columns = named_columns(transactions)
    return [all_columns[column.name] for column in served.columns]
