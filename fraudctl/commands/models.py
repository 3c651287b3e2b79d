"""The commands train, promote and rollback."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from fraudctl.call import refusing
from fraudctl.cli import Commands, console

if TYPE_CHECKING:
    from shared.settings import RegistrySettings
    from training.aliases import Alias

commands = Commands()

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
    of = _alias(_settings(name, alias, tracking_uri))

    from fraudctl import models
    from services.predictor.model import UnusableModel
    from training.aliases import NoSuchVersion

    with refusing(NoSuchVersion, UnusableModel):
        candidate, champion = models.promote(of, version)
    console.print(models.comparison(candidate, champion))
    console.print(f"{of.name} version {version} is now {of.alias}")


@commands.add("rollback", "rollback")
def rollback(name: ModelName = None, alias: ModelAlias = None, tracking_uri: TrackingUri = None) -> None:
    """Move the alias back to its previous version."""
    of = _alias(_settings(name, alias, tracking_uri))

    from training import aliases

    with refusing(aliases.NoSuchVersion):
        version = aliases.move_back(of)
    console.print(f"{of.name} version {version} is {of.alias} again")


def _settings(name: str | None, alias: str | None, tracking_uri: str | None) -> "RegistrySettings":
    """Return the settings. An option that is given overrides the corresponding setting.

    Also limits MLflow's retries and output.
    """
    from shared.settings import RegistrySettings, load

    options = {"mlflow_tracking_uri": tracking_uri, "model_name": name, "model_alias": alias}
    settings = load(RegistrySettings, **{option: value for option, value in options.items() if value})
    settings.set_up_mlflow()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    return settings


def _alias(settings: "RegistrySettings") -> "Alias":
    from training.aliases import Alias

    return Alias(settings.mlflow_tracking_uri, settings.model_name, settings.model_alias)
