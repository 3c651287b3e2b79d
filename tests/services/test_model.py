"""What a model answers, and what is made of it."""

from typing import Any

import numpy as np
import pytest

from services.predictor.model import Model, UnusableModel, make_model, score
from shared.errors import Poison
from shared.records import REFERENCE

BATCH = 3


class Answers:
    """A model with a constant answer, for as many rows as it gets or for a fixed number."""

    def __init__(self, answer: Any, *, rows: int | None = None) -> None:
        self._answer = answer
        self._rows = rows

    def predict(self, rows: Any) -> Any:
        return np.array([self._answer] * (self._rows or len(rows)))


def made(estimator: Any, **metadata: object) -> Model:
    return make_model(
        name="theirs", version="1", estimator=estimator, columns=["amt"], metadata=metadata, logged_at=0, compiled=False
    )


@pytest.mark.parametrize("answer", [1, True, 1.0, [1]])
def test_labels_of_any_type_are_labels(answer: Any) -> None:
    assert score(made(Answers(answer)), [REFERENCE] * BATCH) == [(1, None)] * BATCH


def test_probabilities_are_labelled_by_the_logged_threshold() -> None:
    assert score(made(Answers(0.4), threshold=0.3), [REFERENCE]) == [(1, 0.4)]
    assert score(made(Answers(0.4), threshold=0.5), [REFERENCE]) == [(0, 0.4)]


@pytest.mark.parametrize(
    ("estimator", "metadata", "reason"),
    [
        pytest.param(Answers(0.4), {}, "log the model with a threshold", id="a probability without a threshold"),
        pytest.param(Answers([0, 1]), {}, "does not return one prediction for each row", id="two columns"),
        pytest.param(Answers(1, rows=2), {}, "does not return one prediction for each row", id="too few"),
        pytest.param(Answers(7), {"threshold": 0.5}, "does not return probabilities", id="no probability"),
        pytest.param(Answers(np.nan), {"threshold": 0.5}, "does not return probabilities", id="not a number"),
        pytest.param(Answers("fraud"), {}, "could not convert", id="words"),
    ],
)
def test_other_answers_are_refused(estimator: Any, metadata: dict[str, object], reason: str) -> None:
    with pytest.raises(UnusableModel, match=reason):
        made(estimator, **metadata)


def test_a_model_that_fails_later_is_poison_without_the_digits_of_a_card() -> None:
    class WithProbabilities(Answers):
        def predict(self, rows: Any) -> Any:
            if len(rows) == BATCH:
                raise ValueError("4000000000000002 is stolen")
            return super().predict(rows)

    model = made(WithProbabilities(0))

    with pytest.raises(Poison) as found:
        score(model, [REFERENCE] * BATCH)
    assert "4000000000000002" not in str(found.value)
