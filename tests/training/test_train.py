"""Training: how good the model is, which data is refused, and loading the model from the registry."""

import json
import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import msgspec
import numpy as np
import pandas as pd
import pytest
import sklearn
from conftest import SAMPLE, needs_sample
from sklearn.metrics import average_precision_score, precision_score

from sandbox.generator import ROUND_THE_CLOCK, training_frame
from sandbox.registry import Registry
from shared.profile import Profile
from shared.records import FEATURES
from training import features, train
from training.aliases import Alias

# Load a model where nothing of this project can be imported, and print its probabilities.
LOAD = """
import json, sys
for name in ("training", "training.features", "sandbox", "shared", "services"):
    sys.modules[name] = None
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.sklearn.load_model(sys.argv[2])
print(json.dumps(model.predict_proba(pd.read_csv(sys.stdin))[:, 1].tolist()))
"""


@pytest.fixture(scope="module")
def history() -> pd.DataFrame:
    return training_frame(seed=1).head(8000)


@pytest.fixture(scope="module")
def trained(history: pd.DataFrame) -> train.Trained:
    return train.fit(history, seed=1)


@pytest.fixture
def name() -> str:
    """A model's name that no other test uses."""
    return f"fraud-{uuid.uuid4().hex[:8]}"


def test_the_threshold_is_the_lowest_that_reaches_the_precision() -> None:
    labels = np.array([0, 0, 1, 0, 1, 1])
    probabilities = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])

    assert train.choose_threshold(labels, probabilities, target_precision=0.9) == 0.5
    assert train.choose_threshold(labels, probabilities, target_precision=0.7) == 0.3


def test_where_no_threshold_reaches_the_precision_it_is_the_most_precise() -> None:
    labels = np.array([0, 1, 0])
    probabilities = np.array([0.1, 0.5, 0.9])

    threshold = train.choose_threshold(labels, probabilities, target_precision=0.9)

    assert precision_score(labels, probabilities >= threshold) == 0.5


def test_the_measured_precision_is_the_one_asked_for(trained: train.Trained) -> None:
    assert trained.metrics["precision"] >= train.TARGET_PRECISION
    assert 0 < trained.threshold < 1


def test_the_measures_count_every_row_that_was_held_out(trained: train.Trained) -> None:
    kinds = ("true_positives", "false_positives", "false_negatives", "true_negatives")
    found = trained.metrics

    assert sum(found[kind] for kind in kinds) == len(trained.labels)
    assert found["true_positives"] / (found["true_positives"] + found["false_positives"]) == found["precision"]
    assert found["true_positives"] / (found["true_positives"] + found["false_negatives"]) == found["recall"]
    surest = sorted(zip(trained.probabilities, trained.labels, strict=True), key=lambda each: -each[0])[:100]
    assert found["precision_at_100"] == pytest.approx(sum(label for _, label in surest) / 100, abs=0.02)


def test_it_is_measured_on_later_rows_of_other_cards() -> None:
    history = training_frame(seed=1)
    labels = history["is_fraud"].to_numpy(dtype=int)

    known, unseen, held_out = train.split(history, labels, seed=1)

    cards, times = history["cc_num"], history["trans_date_trans_time"]
    assert not set(cards[known]) & set(cards[unseen])
    assert times[known].max() < times[unseen].min()
    assert "time" in held_out


def test_a_file_whose_frauds_are_from_other_days_is_split_by_card_alone() -> None:
    history = training_frame(seed=1).head(8000)
    labels = history["is_fraud"].to_numpy(dtype=int)
    days = np.where(labels == 1, "2020-06-21", "2019-01-01")
    history = history.assign(trans_date_trans_time=days + history["trans_date_trans_time"].str[10:])

    known, unseen, held_out = train.split(history, labels, seed=1)

    assert not set(history["cc_num"][known]) & set(history["cc_num"][unseen])
    assert (known | unseen).all()
    assert "time" not in held_out


def test_a_confirmed_label_replaces_the_original(history: pd.DataFrame) -> None:
    confirmed = history.iloc[[3]].assign(is_fraud=1 - history["is_fraud"].iloc[3])

    rows = train.together(history.head(10), pd.concat([confirmed, history.iloc[[20]]]))

    assert len(rows) == 11
    wanted = rows[rows["trans_num"] == history["trans_num"].iloc[3]]
    assert wanted["is_fraud"].tolist() == confirmed["is_fraud"].tolist()


def test_the_same_rows_and_seed_make_the_same_model(history: pd.DataFrame, trained: train.Trained) -> None:
    again = train.fit(history, seed=1)

    assert (again.threshold, again.metrics) == (trained.threshold, trained.metrics)
    np.testing.assert_array_equal(again.pipeline.predict_proba(history), trained.pipeline.predict_proba(history))


def test_rows_without_a_label_are_left_out(history: pd.DataFrame, trained: train.Trained) -> None:
    unlabelled = history.head(500).assign(is_fraud=np.nan)

    again = train.fit(pd.concat([history, unlabelled], ignore_index=True), seed=1)

    assert again.metrics == trained.metrics


def test_it_is_measured_on_unseen_cards() -> None:
    # Each card's frauds are known by its population: whoever saw the card has nothing left to guess.
    history = training_frame(seed=1).head(6000)
    cards = {card: number for number, card in enumerate(history["cc_num"].unique())}
    number = history["cc_num"].map(cards)
    guess = np.random.default_rng(0).random(len(cards)) < 0.3
    history = history.assign(city_pop=number * 1000, is_fraud=guess[number].astype(int))

    assert train.fit(history, seed=1).metrics["average_precision"] < 0.6


def test_there_must_be_frauds_to_learn_from_and_to_measure_on(history: pd.DataFrame) -> None:
    legitimate = history[history["is_fraud"] == 0]
    one_card = history.loc[history["is_fraud"] == 1, "cc_num"].iloc[0]

    with pytest.raises(ValueError, match="training needs frauds"):
        train.fit(legitimate, seed=1)
    with pytest.raises(ValueError, match="training needs frauds"):
        train.fit(history.assign(is_fraud=1), seed=1)
    with pytest.raises(ValueError, match="training needs frauds"):
        train.fit(history[history["cc_num"] == one_card], seed=1)
    for seed in range(3):
        with pytest.raises(ValueError, match="training needs frauds on more cards"):
            stolen_once = history[(history["is_fraud"] == 1) & (history["cc_num"] == one_card)]
            train.fit(pd.concat([legitimate, stolen_once]), seed=seed)


@pytest.mark.parametrize("category", ["space_flights", "", None])
def test_an_unknown_category_is_scored_all_the_same(
    history: pd.DataFrame, trained: train.Trained, category: str | None
) -> None:
    one = history.head(1).assign(category=category)

    (probability,) = trained.pipeline.predict_proba(one)[:, 1]

    assert 0 <= probability <= 1


def test_the_local_stacks_champion_raises_an_alarm_within_two_minutes_at_any_hour() -> None:
    trained = train.fit(training_frame(seed=1), seed=1)  # as `fraudctl train` does
    start = datetime(2024, 5, 17, tzinfo=UTC)
    stream = training_frame(rows=60_000, seed=2, start=start, fraud_rate=0.05, fraud_hours=ROUND_THE_CLOCK)

    alarms = trained.pipeline.predict_proba(stream)[:, 1] >= trained.threshold

    seconds_between = 1 / pd.Series(alarms).groupby(stream["unix_time"] // 3600 % 24).mean()  # at one a second
    assert len(seconds_between) == 24
    assert seconds_between.max() < 120


@needs_sample
@pytest.mark.parametrize("seed", [1, 2])
def test_what_the_generator_teaches_holds_for_real_transactions(seed: int) -> None:
    trained = train.fit(training_frame(seed=seed), seed=seed)
    sample = pd.read_csv(SAMPLE)

    probabilities = trained.pipeline.predict_proba(sample[list(FEATURES)])[:, 1]

    legitimate = sample["is_fraud"] == 0
    assert average_precision_score(sample["is_fraud"], probabilities) >= 0.85
    assert (probabilities[legitimate] >= trained.threshold).mean() < 0.05


@needs_sample
@pytest.mark.parametrize("seed", [1, 2])
def test_what_real_transactions_teach_holds_for_unseen_cards(seed: int) -> None:
    assert train.fit(train.read([str(SAMPLE)]), seed=seed).metrics["average_precision"] >= 0.93


def test_files_are_read_with_and_without_their_row_numbers(history: pd.DataFrame, tmp_path: Path) -> None:
    history.head(20).to_csv(tmp_path / "numbered.csv")
    history.tail(10).assign(is_fraud="").to_csv(tmp_path / "plain.csv", index=False)

    frame = train.read([str(tmp_path / "numbered.csv"), str(tmp_path / "plain.csv")])

    assert tuple(frame.columns) == FEATURES
    assert len(frame) == 30
    assert frame["is_fraud"].isna().sum() == 10
    assert frame["cc_num"].tolist() == [str(card) for card in pd.concat([history.head(20), history.tail(10)])["cc_num"]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"\xff\xfea,b\n", "not a text file in UTF-8"),
        (b"a,b\n1,2\n1,2,3,4\n", "not a CSV file whose lines have as many values as its header"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_plain_words(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "other.csv").write_bytes(content)

    with pytest.raises(ValueError, match=rf"other\.csv: {said}$"):
        train.read([str(tmp_path / "other.csv")])


def test_a_file_in_another_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")

    with pytest.raises(ValueError, match=r"other\.csv: columns missing: trans_date_trans_time"):
        train.read([str(tmp_path / "other.csv")])
    with pytest.raises(OSError, match="nowhere"):
        train.read([str(tmp_path / "nowhere.csv")])


def test_a_version_carries_its_threshold_its_columns_and_its_measures(
    trained: train.Trained, registry: Registry, name: str
) -> None:
    train.register(trained, Alias(registry.uri, name, "champion"))

    mlflow.set_tracking_uri(registry.uri)
    info = mlflow.models.get_model_info(f"models:/{name}@champion")
    assert info.metadata["threshold"] == trained.threshold
    assert msgspec.json.decode(info.metadata["reference_profile"], type=Profile) == trained.profile
    assert info.signature.inputs.input_names() == features.RAW
    run = mlflow.get_run(info.run_id).data
    assert run.metrics == pytest.approx(trained.metrics)
    assert float(run.params["threshold"]) == trained.threshold
    assert run.params["held_out"] == trained.held_out
    assert run.tags["version.scikit-learn"] == sklearn.__version__
    pictures = {each.path for each in mlflow.MlflowClient().list_artifacts(info.run_id)}
    assert {"precision_recall.png", "calibration.png", "confusion_matrix.png"} <= pictures


def test_a_version_loads_where_this_project_is_not_installed(
    trained: train.Trained, registry: Registry, name: str, history: pd.DataFrame, tmp_path: Path
) -> None:
    train.register(trained, Alias(registry.uri, name, "champion"))
    batch = history[features.RAW].head(300)

    done = subprocess.run(
        [sys.executable, "-c", LOAD, registry.uri, f"models:/{name}@champion"],
        input=batch.to_csv(index=False),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(trained.pipeline.predict_proba(batch)[:, 1].tolist())
    assert "Warning" not in done.stderr
