"""Promotes a model version after a test prediction, and compares this version with the current one."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from shared.errors import Outage

if TYPE_CHECKING:
    from services.predictor.model import Model
    from training.aliases import Alias


@dataclass(frozen=True)
class Trial:
    """A version's predictions for the recorded transactions.

    The version is loaded in the same way as in the predictor.
    """

    version: str
    predictions: np.ndarray  # (n,)
    probabilities: np.ndarray  # (n,), all NaN if the model returns no probabilities
    ms: float  # time to score all rows


def promote(of: "Alias", version: str) -> tuple[Trial, Trial | None]:
    """Move the alias to `version`. Returns the trial of this version and the trial of the alias's previous version.

    The second trial is None if the alias did not exist or was already on `version`, or if the previous version cannot
    be loaded. Raises NoSuchVersion if `version` does not exist, UnusableModel if it cannot be served, and Outage if the
    registry does not respond.
    """
    # These imports change os.environ, through MLflow and scikit-learn. Importing fraudctl.models must not change it.
    from services.predictor.model import UnusableModel
    from services.predictor.registry import Found, Registry
    from training import aliases

    if not aliases.exists(of, version):
        raise aliases.NoSuchVersion(f"{of.name} has no version {version}")
    with tempfile.TemporaryDirectory() as cache:
        registry = Registry(tracking_uri=of.tracking_uri, name=of.name, cache=Path(cache), compiled=False)
        candidate = _trial(registry.load(Found(version, None)))
        before = aliases.bearer(of)
        try:
            champion = _trial(registry.load(Found(before, None))) if before and before != version else None
        except (UnusableModel, Outage):  # a champion that cannot be loaded must not prevent its replacement
            champion = None
    aliases.move(of, version)
    return candidate, champion


def comparison(candidate: Trial, champion: Trial | None) -> Table:
    """Return a table that compares the trials, which scored the same rows."""
    table = Table("recorded transactions", *(f"version {each.version}" for each in (champion, candidate) if each))
    trials = [each for each in (champion, candidate) if each]
    table.add_row("rows", *(f"{len(each.predictions):,}" for each in trials))
    table.add_row("predicted as fraud", *(f"{int(each.predictions.sum()):,}" for each in trials))
    table.add_row("mean probability", *(f"{each.probabilities.mean():.4f}" for each in trials))
    table.add_row("ms", *(f"{each.ms:.1f}" for each in trials))
    if champion:
        table.add_row("different predictions", "", f"{int((champion.predictions != candidate.predictions).sum()):,}")
        table.add_row(
            "largest difference in probability",
            "",
            f"{np.abs(champion.probabilities - candidate.probabilities).max():.4f}",
        )
    return table


def _trial(model: "Model") -> Trial:
    from services.predictor.model import recorded, score

    began = time.monotonic()
    scores = score(model, recorded())
    ms = 1000 * (time.monotonic() - began)
    probabilities = [np.nan if each.probability is None else each.probability for each in scores]
    return Trial(model.version, np.array([each.label for each in scores]), np.array(probabilities), ms)
