"""Models that crash, hang, leak or answer nonsense: the one before scores every row, or the row is set aside."""

import ctypes
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import cloudpickle
import mlflow
import mlflow.sklearn
import numpy as np
import pandas as pd
import pytest
import requests
from conftest import Rig, dead_letter_topic, make_transactions, until
from mlflow.models import infer_signature
from msgspec.structs import replace
from served import frame

from sandbox.processes import free_port
from sandbox.registry import Registry
from shared.kafka.messages import headers
from shared.provenance import from_headers
from shared.records import Transaction, decode_prediction, encode_transaction

cloudpickle.register_pickle_by_value(sys.modules[__name__])

QUICK = {"MODEL_REFRESH_SECONDS": "0.2", "MODEL_LOAD_SECONDS": "20", "MODEL_BATCH_SECONDS": "1.5"}


def exit_at_once() -> None:
    os._exit(3)


def segfault() -> None:
    ctypes.string_at(0)


def hang() -> None:
    time.sleep(600)


def take_10_gb() -> None:
    np.ones(10 * 1024**3, dtype=np.int8)


def exit_as_programs_do() -> None:
    raise SystemExit("the model has had enough")


MISDEEDS = {each.__name__: each for each in (exit_at_once, segfault, hang, take_10_gb, exit_as_programs_do)}
CAUSES = {
    "exit_at_once": "its process ended with exit code 3",
    "segfault": "its process was ended by SIGSEGV",
    "hang": "answer",
    "take_10_gb": "it uses more memory than MODEL_MEMORY_MB allows",
    "exit_as_programs_do": "SystemExit: the model has had enough",
    "nan": "does not return a probability: nan",
}


class AtLoad:
    """A model that misbehaves when it is loaded."""

    def __init__(self, misdeed: str) -> None:
        self.misdeed = misdeed

    def predict(self, rows: pd.DataFrame) -> Any:
        return np.zeros(len(rows))

    def __reduce__(self) -> tuple[Any, ...]:
        return MISDEEDS[self.misdeed], ()


class AtSomeRows:
    """A model that does to rows of a category what the category says."""

    def __init__(self, label: int = 0) -> None:
        self.label = label

    def predict(self, rows: pd.DataFrame) -> Any:
        for category in rows["category"]:
            if category in MISDEEDS:
                MISDEEDS[category]()
        return np.where(rows["category"] == "nan", np.nan, 0.25 + 0.5 * self.label)


class Meek(AtSomeRows):
    """A model that misbehaves at no row."""

    def predict(self, rows: pd.DataFrame) -> Any:
        return np.full(len(rows), 0.25)


def promote(registry: Registry, name: str, model: Any, threshold: float | None = 0.5) -> str:
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("misbehaving")
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            model,
            name="model",
            signature=infer_signature(frame(make_transactions(2))[["category"]]),
            registered_model_name=name,
            pip_requirements=[],
            serialization_format="cloudpickle",
            metadata={"threshold": threshold} if threshold else None,
        )
    version = str(mlflow.MlflowClient().search_model_versions(f"name='{name}'")[0].version)
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", version)
    return version


@pytest.fixture
def name(rig: Rig, registry: Registry) -> str:
    name = f"misbehaving-{uuid.uuid4().hex[:8]}"
    rig.environment |= QUICK | {"MLFLOW_TRACKING_URI": registry.uri, "MODEL_NAME": name}
    rig.environment["METRICS_PORT"] = str(free_port())
    return name


@contextmanager
def always_live(rig: Rig) -> Iterator[None]:
    """Fail if the predictor does not say that it is live at any time."""
    over, answers = Event(), []

    def ask() -> None:
        while not over.wait(0.1):
            answers.append(
                requests.get(f"http://127.0.0.1:{rig.environment['METRICS_PORT']}/live", timeout=5).status_code
            )

    thread = Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert set(answers) == {200}


def serves(rig: Rig, version: str) -> bool:
    """Whether the predictor's metrics name this version."""
    metrics = requests.get(f"http://127.0.0.1:{rig.environment['METRICS_PORT']}/metrics", timeout=5).text
    return any("fraud_alarm_model_info{" in line and f'version="{version}"' in line for line in metrics.splitlines())


def refusals(rig: Rig, version: str) -> list[str]:
    """What the log says about this version's refusal."""
    lines = rig.log("predictor").splitlines()
    return [line for line in lines if "event='model_refused'" in line and f"/{version}: " in line]


def test_a_version_that_misbehaves_when_it_is_loaded_is_refused(rig: Rig, registry: Registry, name: str) -> None:
    good = promote(registry, name, AtSomeRows())
    rig.start("predictor", MODEL_LOAD_SECONDS="4")

    with always_live(rig):
        for number, misdeed in enumerate(MISDEEDS):
            bad = promote(registry, name, AtLoad(misdeed), threshold=None)
            until(partial(refusals, rig, bad), what=f"the refusal of {misdeed}")
            rig.put_transactions(make_transactions(20, seed=number))

        messages = rig.read(rig.topic_2, 20 * len(MISDEEDS))
    assert Counter(from_headers(headers(each)).model_version for each in messages) == {good: 20 * len(MISDEEDS)}
    for number, misdeed in enumerate(MISDEEDS):
        (line,) = refusals(rig, str(int(good) + 1 + number))
        assert CAUSES[misdeed] in line


def test_a_version_that_misbehaves_at_its_first_batches_gives_way_to_the_one_before(
    rig: Rig, registry: Registry, name: str
) -> None:
    good = promote(registry, name, Meek())
    process = rig.start("predictor")
    sent: list[Transaction] = []

    with always_live(rig):
        for number, misdeed in enumerate(CAUSES):
            bad = promote(registry, name, AtSomeRows(label=1))
            until(partial(serves, rig, bad), what="the new version")
            batch = make_transactions(40, seed=number)
            batch[20] = replace(batch[20], category=misdeed)
            rig.put_transactions(batch[:20])
            rig.read(rig.topic_2, len(sent) + 20)
            rig.put_transactions(batch[20:])
            rig.read(rig.topic_2, len(sent) + 40)
            sent += batch
            until(partial(refusals, rig, bad), what=f"the refusal of {misdeed}")
            (line,) = refusals(rig, bad)
            assert CAUSES[misdeed] in line
            assert f"serving='{good}'" in line

        messages = rig.read(rig.topic_2, len(sent), extra_s=1)
    assert len(messages) == len({decode_prediction(each.value()).identity for each in messages}) == len(sent)
    for message in messages:
        prediction = decode_prediction(message.value())
        version = from_headers(headers(message)).model_version
        assert prediction.prediction == int(version != good)  # the answer is of the version that is named
        if prediction.category in CAUSES:
            assert version == good
    assert not process.said("event='dead_letters'")


def test_a_version_that_has_not_proved_itself_is_nothing_to_fall_back_on(
    rig: Rig, registry: Registry, name: str
) -> None:
    good = promote(registry, name, Meek())
    process = rig.start("predictor")
    for _ in range(2):
        bad = promote(registry, name, AtSomeRows(label=1))
        until(partial(serves, rig, bad), what="the new version")

    batch = make_transactions(100)
    batch[50] = replace(batch[50], category="exit_at_once")
    rig.put_transactions(batch)

    messages = rig.read(rig.topic_2, len(batch), extra_s=1)
    assert len(messages) == len(batch)
    assert {from_headers(headers(each)).model_version for each in messages} >= {good}
    assert refusals(rig, bad)
    assert not process.said("event='dead_letters'")


def test_a_version_that_fails_after_a_restart_still_gives_way_to_the_one_before(
    rig: Rig, registry: Registry, name: str
) -> None:
    good = promote(registry, name, Meek())
    rig.start("predictor").stop()
    bad = promote(registry, name, AtSomeRows(label=1))
    rig.start("predictor").kill()
    process = rig.start("predictor")

    batch = make_transactions(100)
    batch[50] = replace(batch[50], category="exit_at_once")
    rig.put_transactions(batch)

    messages = rig.read(rig.topic_2, len(batch), extra_s=1)
    assert {from_headers(headers(each)).model_version for each in messages} >= {good}
    assert len(messages) == len(batch)
    assert refusals(rig, bad)
    assert not process.said("event='dead_letters'")


def test_a_row_that_ends_the_only_version_is_set_aside(rig: Rig, registry: Registry, name: str) -> None:
    promote(registry, name, AtSomeRows())
    rig.start("predictor")
    bad: dict[str, bytes] = {}

    with always_live(rig):
        for number, misdeed in enumerate(CAUSES):
            batch = make_transactions(100, seed=number)
            batch[50] = replace(batch[50], category=misdeed)
            bad[misdeed] = encode_transaction(batch[50])
            rig.put_transactions(batch)
        messages = rig.read(rig.topic_2, 99 * len(CAUSES), timeout_s=120, extra_s=1)
        letters = rig.read(dead_letter_topic(rig.topic_1), len(CAUSES))

    assert len(messages) == len({decode_prediction(each.value()).identity for each in messages}) == 99 * len(CAUSES)
    assert {each.value() for each in letters} == set(bad.values())
    reasons = {each.value(): dict(headers(each))["dlq-reason"] for each in letters}
    for misdeed, value in bad.items():
        reason = str(reasons[value])
        assert CAUSES[misdeed].replace("3", "#") in reason.replace("3", "#")
    said = [line for line in rig.log("predictor").splitlines() if "event='model_f" in line]
    for misdeed in CAUSES:
        lines = [line for line in said if CAUSES[misdeed].split(" 3")[0] in line]
        assert lines
        assert all("version='1'" in line for line in lines)


def test_a_model_that_ends_its_process_at_every_row_is_not_taken_out_on_the_rows(
    rig: Rig, registry: Registry, name: str, tmp_path: Path
) -> None:
    flag = tmp_path / "broken"

    class Later(AtSomeRows):
        def predict(self, rows: pd.DataFrame) -> Any:
            if flag.exists():
                os._exit(3)
            return np.zeros(len(rows)) + 0.25

    promote(registry, name, Later())
    process = rig.start("predictor", BACKOFF_MAX_SECONDS="0.5")
    flag.touch()
    batch = make_transactions(50)
    rig.put_transactions(batch)
    until(lambda: process.said("Promote a different version"), what="a word on the model")

    version = promote(registry, name, AtSomeRows())

    messages = rig.read(rig.topic_2, len(batch), extra_s=1)
    assert {from_headers(headers(each)).model_version for each in messages} == {version}
    assert len(messages) == len(batch)
    assert not process.said("event='dead_letters'")


def test_a_model_s_process_ends_with_the_predictor() -> None:
    code = (
        "import time; from services.predictor.hosted import Host\n"
        "host = Host(); print(host._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as predictor:
        assert predictor.stdout
        pid = int(predictor.stdout.readline())
        predictor.kill()

    until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())
