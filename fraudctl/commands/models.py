"""The commands train, promote, rollback and models check."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from fraudctl.call import CallError, refusing
from fraudctl.cli import Commands, console, say

if TYPE_CHECKING:
    from services.predictor.settings import ModelSettings
    from training.aliases import Alias

commands = Commands()
check_commands = Commands(help="Check model versions.")

_PATIENT_S = 60.0  # a registry that has just been started takes many seconds for its first response

ModelName = Annotated[
    str | None, typer.Option("--name", metavar="MODEL", help="Name of the registered model. Default: MODEL_NAME.")
]
ModelAlias = Annotated[
    str | None, typer.Option("--alias", metavar="ALIAS", help="Alias to move. Default: MODEL_ALIAS.")
]
TrackingUri = Annotated[
    str | None, typer.Option(metavar="URI", help="URI of the MLflow registry. Default: MLFLOW_TRACKING_URI.")
]


@commands.add(
    "train",
    "train --data spring.csv summer.csv --validated validated.csv",
    "train --alias challenger",
)
def train(
    more: Annotated[list[str] | None, typer.Argument(metavar="FILE", help="Additional training files.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Training file or URL (repeatable). Default: generated transactions."),
    ] = None,
    name: ModelName = None,
    alias: ModelAlias = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed for the data split, the model and generated transactions.")
    ] = 1,
    target_precision: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Precision to reach on unseen cards.")
    ] = 0.9,
    validated: Annotated[
        str | None, typer.Option(metavar="FILE", help="File or URL of confirmed rows to add to the training data.")
    ] = None,
    if_absent: Annotated[
        bool, typer.Option("--if-absent", help="Do nothing if a version already has the alias.")
    ] = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train a model, evaluate it on unseen cards, and register it."""
    from fraudctl import registry

    settings = _settings(name, alias, tracking_uri)
    if if_absent and (present := registry.version_with_alias(settings, settings.model_alias, timeout_s=_PATIENT_S)):
        console.print(f"{settings.model_name} version {present} is already {settings.model_alias}")
        return

    from rich.table import Table

    from sandbox.generator import training_frame
    from training import train as training

    of = _alias(settings)
    sources = [*(data or []), *(more or [])]
    with refusing(ValueError):
        frame = training.read(sources) if sources else training_frame(seed=seed)
        if validated:
            frame = training.together(frame, training.read([validated]))
        trained = training.fit(frame, seed=seed, target_precision=target_precision)
        version = training.register(trained, of)
    console.print(f"{of.name} version {version} is now {of.alias}")
    table = Table("measure", f"on {trained.held_out}")
    for measure, value in {**trained.metrics, "threshold": trained.threshold}.items():
        table.add_row(measure.replace("_", " "), f"{value:.4f}".removesuffix(".0000"))
    console.print(table)


@commands.add("promote", "promote 7")
def promote(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Version of the registered model.")],
    name: ModelName = None,
    alias: ModelAlias = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Move the alias to a version that passes a test prediction.

    Shows a comparison with the version that had the alias before.
    """
    settings = _settings(name, alias, tracking_uri)
    of = _alias(settings)

    from fraudctl import models
    from services.predictor.model import UnusableModel
    from training.aliases import NoSuchVersion

    with refusing(NoSuchVersion, UnusableModel):
        candidate, champion = models.promote(settings, of, version)
    console.print(models.comparison(*filter(None, (champion, candidate))))
    console.print(f"{of.name} version {version} is now {of.alias}")


@check_commands.add("check", "models check 7")
def check(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Version of the registered model.")],
    name: ModelName = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Show whether the predictor can serve a version, and compare its predictions with the model's own.

    The exit code is 1 if the version cannot be served, or if predictions differ.
    """
    settings = _settings(name, None, tracking_uri)

    from fraudctl import models
    from training import aliases

    if not aliases.exists(_alias(settings), version):
        raise CallError(f"{settings.model_name} has no version {version}")
    found = models.check(settings, version)
    say(f"interpreter: {found.interpreter}")
    say(f"packages: {found.packages or 'as it was logged with'}")
    if found.refused:
        say(f"refused: {found.refused}")
        raise typer.Exit(1)
    say("the predictor can serve it")
    trials = [each for each in (found.own, found.served) if each]
    console.print(models.comparison(*trials))
    if found.no_own:
        say(f"not compared with its own predictions: {found.no_own}")
    if len(trials) == 2 and (trials[0].predictions != trials[1].predictions).any():
        raise typer.Exit(1)


@commands.add("rollback", "rollback")
def rollback(name: ModelName = None, alias: ModelAlias = None, tracking_uri: TrackingUri = None) -> None:
    """Move the alias back to its previous version."""
    of = _alias(_settings(name, alias, tracking_uri))

    from training import aliases

    with refusing(aliases.NoSuchVersion):
        version = aliases.move_back(of)
    console.print(f"{of.name} version {version} is {of.alias} again")


def _settings(name: str | None, alias: str | None, tracking_uri: str | None) -> "ModelSettings":
    """Return the settings. An option that is given overrides the corresponding setting.

    Also limits MLflow's retries and output.
    """
    from services.predictor.settings import ModelSettings
    from shared.settings import load

    options = {"mlflow_tracking_uri": tracking_uri, "model_name": name, "model_alias": alias}
    settings = load(ModelSettings, **{option: value for option, value in options.items() if value})
    settings.set_up_mlflow()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    return settings


def _alias(settings: "ModelSettings") -> "Alias":
    from training.aliases import Alias

    return Alias(settings.mlflow_tracking_uri, settings.model_name, settings.model_alias)
