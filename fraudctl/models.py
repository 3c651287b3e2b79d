"""Versions of the model: which may bear the alias, and how two of them compare."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from services.predictor.model import Model, UnusableModel, recorded, score
from services.predictor.registry import Found, Registry
from shared.errors import Outage
from training import aliases
from training.aliases import Alias, NoSuchVersion


@dataclass(frozen=True)
class Trial:
    """A version, as the predictor would load it, on the recorded transactions."""

    version: str
    labels: np.ndarray  # (n,)
    probabilities: np.ndarray  # (n,), NaN where the model gives none
    ms: float  # for all of them


def promote(of: Alias, version: str) -> tuple[Trial, Trial | None]:
    """Give the alias to a version that can be served; returns how it and the one before it did.

    Raises NoSuchVersion, UnusableModel if it cannot be served, Outage if the registry does not answer.
    """
    if not aliases.exists(of, version):
        raise NoSuchVersion(f"{of.name} has no version {version}")
    with tempfile.TemporaryDirectory() as cache:
        registry = Registry(tracking_uri=of.tracking_uri, name=of.name, cache=Path(cache), compiled=False)
        candidate = _tried(registry.load(Found(version, None)))
        before = aliases.bearer(of)
        try:
            champion = _tried(registry.load(Found(before, None))) if before and before != version else None
        except (UnusableModel, Outage):  # it is no reason to stay with it
            champion = None
    aliases.move(of, version)
    return candidate, champion


def comparison(candidate: Trial, champion: Trial | None) -> Table:
    """Both on the same rows."""
    table = Table(
        "on the recorded transactions", *(f"version {each.version}" for each in (champion, candidate) if each)
    )
    trials = [each for each in (champion, candidate) if each]
    table.add_row("rows", *(f"{len(each.labels):,}" for each in trials))
    table.add_row("called fraud", *(f"{int(each.labels.sum()):,}" for each in trials))
    table.add_row("mean probability", *(f"{each.probabilities.mean():.4f}" for each in trials))
    table.add_row("ms", *(f"{each.ms:.1f}" for each in trials))
    if champion:
        table.add_row("labels that differ", "", f"{int((champion.labels != candidate.labels).sum()):,}")
        table.add_row(
            "probability apart, at most", "", f"{np.abs(champion.probabilities - candidate.probabilities).max():.4f}"
        )
    return table


def _tried(model: Model) -> Trial:
    began = time.monotonic()
    scores = score(model, recorded())
    ms = 1000 * (time.monotonic() - began)
    probabilities = [np.nan if each.probability is None else each.probability for each in scores]
    return Trial(model.version, np.array([each.label for each in scores]), np.array(probabilities), ms)
