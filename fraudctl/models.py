"""Checks whether the predictor can serve a model version, compares versions, and moves aliases."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from shared.errors import Outage, Poison

if TYPE_CHECKING:
    from services.predictor.model import Model, Prediction
    from services.predictor.registry import Registry
    from services.predictor.settings import ModelSettings
    from training.aliases import Alias


@dataclass(frozen=True)
class Trial:
    """Predictions for the recorded transactions."""

    of: str  # whose predictions these are
    predictions: np.ndarray  # (n,)
    probabilities: np.ndarray  # (n,), all NaN if the model returns no probabilities
    ms: float  # time to score all rows


@dataclass(frozen=True)
class Check:
    """Whether the predictor can serve a version."""

    interpreter: str
    packages: str  # in words, how they differ from those that the version was logged with; empty if they do not
    refused: str  # why the version cannot be served; empty if it can be
    served: Trial | None = None  # as the predictor scores
    own: Trial | None = None  # as MLflow and the model's library score by themselves
    no_own: str = ""  # why there are no such predictions


def check(settings: "ModelSettings", version: str) -> Check:
    """Load a version in the same way as the predictor, and compare its predictions with the model's own.

    Raises Outage if the registry does not respond, or has no such version.
    """
    from services.predictor.model import UnusableModel, recorded
    from services.predictor.packages import in_words
    from services.predictor.registry import Found

    with _registry(settings) as registry:
        found = Found(version, None)
        interpreter = registry.interpreter(found)
        about = (interpreter.path, in_words(interpreter.differences))
        try:
            model = registry.load(found)
        except UnusableModel as error:
            return Check(*about, str(error))
        try:
            served = _trial(model, "as it is served")
            began = time.monotonic()
            try:
                own = _as_trial("by itself", model.own_answers(recorded()), began)
            except Poison as poison:
                return Check(*about, "", served, None, str(poison))
            return Check(*about, "", served, own)
        finally:
            model.end()


def promote(settings: "ModelSettings", of: "Alias", version: str) -> tuple[Trial, Trial | None]:
    """Move the alias to `version`. Returns the trial of this version and the trial of the alias's previous version.

    The second trial is None if the alias did not exist or was already on `version`, or if the previous version cannot
    be loaded. Raises NoSuchVersion if `version` does not exist, UnusableModel if it cannot be served, and Outage if the
    registry does not respond.
    """
    # These imports change os.environ, through MLflow. Importing fraudctl.models must not change it.
    from services.predictor.model import UnusableModel
    from training import aliases

    if not aliases.exists(of, version):
        raise aliases.NoSuchVersion(f"{of.name} has no version {version}")
    with _registry(settings) as registry:
        candidate = _loaded(registry, version)
        before = aliases.bearer(of)
        try:
            champion = _loaded(registry, before) if before and before != version else None
        except (UnusableModel, Outage):  # a champion that cannot be loaded must not prevent its replacement
            champion = None
    aliases.move(of, version)
    return candidate, champion


def comparison(*trials: Trial) -> Table:
    """Return a table that compares trials of the same rows. If there are two, also what differs."""
    table = Table("recorded transactions", *(each.of for each in trials))
    table.add_row("rows", *(f"{len(each.predictions):,}" for each in trials))
    table.add_row("predicted as fraud", *(f"{int(each.predictions.sum()):,}" for each in trials))
    table.add_row("mean probability", *(f"{each.probabilities.mean():.4f}" for each in trials))
    table.add_row("ms", *(f"{each.ms:.1f}" for each in trials))
    if len(trials) == 2:
        one, other = trials
        table.add_row("different predictions", "", f"{int((one.predictions != other.predictions).sum()):,}")
        apart = np.abs(one.probabilities - other.probabilities).max()
        shown = f"{apart:.0e}" if 0 < apart < 1e-4 else f"{apart:.4f}"
        table.add_row("largest difference in probability", "", shown)
    return table


@contextmanager
def _registry(settings: "ModelSettings") -> "Iterator[Registry]":
    from services.predictor.registry import Registry

    with tempfile.TemporaryDirectory() as cache:
        yield Registry(settings, cache=Path(cache), compiled=False)


def _loaded(registry: "Registry", version: str) -> Trial:
    from services.predictor.registry import Found

    model = registry.load(Found(version, None))
    try:
        return _trial(model, f"version {version}")
    finally:
        model.end()


def _trial(model: "Model", of: str) -> Trial:
    from services.predictor.model import recorded

    began = time.monotonic()
    return _as_trial(of, model.score(recorded()), began)


def _as_trial(of: str, results: "list[Prediction | Poison]", began: float) -> Trial:
    ms = 1000 * (time.monotonic() - began)
    found = [each for each in results if not isinstance(each, Poison)]
    probabilities = [np.nan if each.probability is None else each.probability for each in found]
    return Trial(of, np.array([each.label for each in found]), np.array(probabilities), ms)
