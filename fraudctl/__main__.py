"""fraudctl, the operator's command line. Exit codes: 0 done, 1 something is wrong, 2 the call or a setting is."""

import json
import logging
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from shared.errors import Outage, SettingsError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
topics_app = typer.Typer(no_args_is_help=True, help="The topics and their dead-letter topics.")
app.add_typer(topics_app, name="topics")
console = Console()


@app.command()
def demo(
    transactions: Annotated[int | None, typer.Option(min=1, help="How many; without it, until Ctrl+C.")] = None,
    rate: Annotated[float, typer.Option(min=0, help="Transactions a second; 0 as fast as it goes.")] = 100.0,
    source: Annotated[Path | None, typer.Option(help="A CSV in the training format; without it, generated.")] = None,
    broker: Annotated[str, typer.Option(help="auto, embedded, apache or HOST:PORT.")] = "auto",
    database: Annotated[str | None, typer.Option(help="URL of a PostgreSQL; without it, one is started.")] = None,
    report: Annotated[Path | None, typer.Option(help="Where the ledger goes as JSON.")] = None,
    work_dir: Annotated[Path | None, typer.Option(help="Where mails, logs, database and registry are kept.")] = None,
    fraud_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of frauds among generated ones.")] = 0.0038,
) -> None:
    """Run everything on this machine, stream transactions through it, and see whether the ledger balances."""
    from fraudctl import demo as runner
    from sandbox.payments_api import SourceError, check_source
    from sandbox.processes import StandInError
    from sandbox.stack import choose_broker

    with ExitStack() as stack:
        directory = work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fraud-alarm-")))
        try:
            if source:
                check_source(source)
            if report:
                report.parent.mkdir(parents=True, exist_ok=True)
                report.touch()
            kind, description = choose_broker(broker)
            console.print(f"broker: {description}", highlight=False, soft_wrap=True)
            directory.mkdir(parents=True, exist_ok=True)
            ledger = runner.run(
                runner.Options(
                    transactions=transactions,
                    rate=rate,
                    source=source,
                    fraud_rate=fraud_rate,
                    broker=kind,
                    database=database,
                    work_dir=directory.resolve(),
                ),
                console,
            )
        except (SourceError, StandInError, SettingsError, Outage, OSError) as error:
            _refuse(error)
    runner.show(ledger, console)
    if report:
        report.write_text(json.dumps(ledger.report(), indent=2) + "\n")
    raise typer.Exit(0 if ledger.balanced else 1)


@app.command()
def train(
    data: Annotated[list[str] | None, typer.Option(help="Training files or URLs; without any, generated.")] = None,
    name: Annotated[str, typer.Option(envvar="MODEL_NAME", help="Registered model.")] = "fraud",
    alias: Annotated[str, typer.Option(envvar="MODEL_ALIAS", help="Alias the new version gets.")] = "champion",
    seed: Annotated[int, typer.Option(help="Of the split, the model and the generator.")] = 1,
    target_precision: Annotated[float, typer.Option(min=0, max=1, help="Of the alarms, on unseen cards.")] = 0.9,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Only if no version has the alias yet.")] = False,
    tracking_uri: Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="The MLflow registry.")] = "",
) -> None:
    """Train a model, measure it on cards it never saw, and register it."""
    from training import train as training

    if not tracking_uri:
        _refuse(SettingsError("MLFLOW_TRACKING_URI: missing"))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it tries for minutes, in silence
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        if if_absent and (present := training.version_of(tracking_uri=tracking_uri, name=name, alias=alias)):
            console.print(f"{name} version {present} is {alias} already")
            return
        frame = training.read(data) if data else training.generate(seed=seed)
        trained = training.fit(frame, seed=seed, target_precision=target_precision)
        version = training.register(trained, tracking_uri=tracking_uri, name=name, alias=alias)
    except (Outage, OSError, ValueError) as error:
        _refuse(error)
    console.print(f"{name} version {version} is {alias} now")
    table = Table("measure", "on unseen cards")
    for measure, value in {**trained.metrics, "threshold": trained.threshold}.items():
        table.add_row(measure.replace("_", " "), f"{value:.4f}")
    console.print(table)


@topics_app.command("create")
def topics_create(
    partitions: Annotated[int, typer.Option(min=1, help="Of each new topic.")] = 6,
) -> None:
    """Create what is missing; nothing that exists is changed."""
    from fraudctl import topics
    from shared.settings import ServiceSettings, kafka_properties, load

    try:
        settings = load(ServiceSettings)
        names = [settings.topic_1, settings.topic_2]
        created = topics.create(kafka_properties(settings), names, partitions=partitions)
    except (SettingsError, Outage) as error:
        _refuse(error)
    console.print(f"created: {', '.join(created)}" if created else "all topics are there")


def _refuse(error: Exception) -> NoReturn:
    reason = str(error)
    if isinstance(error, OSError) and error.filename:
        reason = f"{error.filename}: {error.strerror}"
    sys.stderr.write(f"fraudctl: {reason}\n")
    raise typer.Exit(2)


def main() -> None:
    """The entry point."""
    logging.getLogger("librdkafka").addHandler(logging.NullHandler())  # errors come back as such
    app()


if __name__ == "__main__":
    main()
