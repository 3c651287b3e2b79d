"""fraudctl, the operator's command line. Exit codes: 0 done, 1 something is wrong, 2 the call or a setting is."""

import json
import logging
import os
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from shared.errors import Outage, SettingsError
from shared.settings import ServiceSettings, kafka_properties, load

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
topics_app = typer.Typer(no_args_is_help=True, help="The topics and their dead-letter topics.")
app.add_typer(topics_app, name="topics")
letters_app = typer.Typer(no_args_is_help=True, help="What the services refused: see it, mend it, put it back.")
app.add_typer(letters_app, name="dead-letters")
console = Console()

OfTopic = Annotated[str | None, typer.Option("--topic", help="Only those of this topic.")]
OfReason = Annotated[str, typer.Option("--reason", help="Only those whose reason contains this.")]
Since = Annotated[str | None, typer.Option(help="Only those since a time (UTC, 2026-01-31T21:30) or for 90m, 2h, 3d.")]
Limit = Annotated[int | None, typer.Option(min=1, help="No more than these many, the oldest.")]
ModelName = Annotated[str, typer.Option("--name", envvar="MODEL_NAME", help="Registered model.")]
ModelAlias = Annotated[str, typer.Option("--alias", envvar="MODEL_ALIAS", help="Alias that a version gets.")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="The MLflow registry.")]


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
def chaos(
    more: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="More scenarios.")] = None,
    scenario: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Which; without it, all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the faults; without it, drawn.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="How long each streams; without it, as needed.")] = None,
    report: Annotated[Path | None, typer.Option(help="Where the results go as JSON.")] = None,
    work_dir: Annotated[Path | None, typer.Option(help="Where logs and mails are kept.")] = None,
) -> None:
    """Kill, stop and break the parts under load on Apache Kafka; exit 1 at the first promise that does not hold."""
    from fraudctl import chaos as runner
    from sandbox.processes import StandInError

    names = [*(scenario or []), *(more or [])] or list(runner.SCENARIOS)
    if unknown := [name for name in names if name not in runner.SCENARIOS]:
        _refuse(SettingsError(f"--scenario: no {', '.join(unknown)}; there are {', '.join(runner.SCENARIOS)}"))
    chosen = random.randrange(10**6) if seed is None else seed  # noqa: S311 - makes faults, guards nothing
    results = []
    with ExitStack() as stack:
        directory = work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fraud-alarm-")))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for result in runner.campaign(
                names, seed=chosen, minutes=minutes, work_dir=directory.resolve(), console=console
            ):
                results.append(result)
                runner.show(result, console)
                if report:
                    report.write_text(json.dumps([each.report() for each in results], indent=2) + "\n")
                if result.broken:
                    raise typer.Exit(1)
        except (StandInError, SettingsError, Outage, OSError) as error:
            _refuse(error)


@app.command()
def train(
    more: Annotated[list[str] | None, typer.Argument(metavar="FILE_OR_URL", help="More training files.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE_OR_URL", help="Training files; without any, generated.")
    ] = None,
    name: ModelName = "fraud",
    alias: ModelAlias = "champion",
    seed: Annotated[int, typer.Option(help="Of the split, the model and the generator.")] = 1,
    target_precision: Annotated[float, typer.Option(min=0, max=1, help="Of the alarms, on unseen cards.")] = 0.9,
    validated: Annotated[str | None, typer.Option(help="A file or URL of confirmed rows, added to the others.")] = None,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Only if no version has the alias yet.")] = False,
    tracking_uri: TrackingUri = "",
) -> None:
    """Train a model, measure it on cards it never saw, and register it."""
    from training import aliases
    from training import train as training

    of = aliases.Alias(_registry(tracking_uri), name, alias)
    sources = [*(data or []), *(more or [])]
    try:
        if if_absent and (present := aliases.bearer(of)):
            console.print(f"{name} version {present} is {alias} already")
            return
        frame = training.read(sources) if sources else training.generate(seed=seed)
        if validated:
            frame = training.together(frame, training.read([validated]))
        trained = training.fit(frame, seed=seed, target_precision=target_precision)
        version = training.register(trained, of)
    except (Outage, OSError, ValueError) as error:
        _refuse(error)
    console.print(f"{name} version {version} is {alias} now")
    table = Table("measure", f"on {trained.held_out}")
    for measure, value in {**trained.metrics, "threshold": trained.threshold}.items():
        table.add_row(measure.replace("_", " "), f"{value:.4f}".removesuffix(".0000"))
    console.print(table)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="Of the registered model.")],
    name: ModelName = "fraud",
    alias: ModelAlias = "champion",
    tracking_uri: TrackingUri = "",
) -> None:
    """Give the alias to a version that passes a smoke prediction, and show how it compares with the one before it."""
    from fraudctl import models
    from services.predictor.model import UnusableModel
    from training.aliases import Alias, NoSuchVersion

    try:
        candidate, champion = models.promote(Alias(_registry(tracking_uri), name, alias), version)
    except (NoSuchVersion, UnusableModel, Outage) as error:
        _refuse(error)
    console.print(models.comparison(candidate, champion))
    console.print(f"{name} version {version} is {alias} now")


@app.command()
def rollback(name: ModelName = "fraud", alias: ModelAlias = "champion", tracking_uri: TrackingUri = "") -> None:
    """Give the alias back to the version that had it before."""
    from training import aliases

    try:
        version = aliases.move_back(aliases.Alias(_registry(tracking_uri), name, alias))
    except (aliases.NoSuchVersion, Outage) as error:
        _refuse(error)
    console.print(f"{name} version {version} is {alias} again")


def _registry(tracking_uri: str) -> str:
    """The address of the registry, and MLflow told not to try for minutes, in silence."""
    if not tracking_uri:
        _refuse(SettingsError("MLFLOW_TRACKING_URI: missing"))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    return tracking_uri


@topics_app.command("create")
def topics_create(
    partitions: Annotated[int, typer.Option(min=1, help="Of each new topic.")] = 6,
) -> None:
    """Create what is missing; nothing that exists is changed."""
    from fraudctl import topics

    try:
        settings, properties = _kafka()
        created = topics.create(properties, [settings.topic_1, settings.topic_2], partitions=partitions)
        created += topics.create(properties, [settings.challenger_topic], partitions=partitions, letters=False)
    except (SettingsError, Outage) as error:
        _refuse(error)
    console.print(f"created: {', '.join(created)}" if created else "all topics are there")


@letters_app.command("list")
def letters_list(topic: OfTopic = None, reason: OfReason = "", since: Since = None, limit: Limit = None) -> None:
    """List dead letters, the oldest first."""
    from fraudctl import letters

    try:
        settings, properties = _kafka()
        selection = letters.select(settings, topic=topic, reason=reason, since=since)
        found = letters.read(properties, selection)[:limit]
    except (letters.CallError, SettingsError, Outage) as error:
        _refuse(error)
    if found:
        console.print(letters.overview(found))
    for line in letters.totals(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@letters_app.command("show")
def letters_show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="As listed, such as topic_1.dlq:3:17.")],
    save: Annotated[Path | None, typer.Option(help="A new file for the value, all of it, byte for byte.")] = None,
) -> None:
    """Show what a dead letter holds, without card number and birth date."""
    from fraudctl import letters

    try:
        settings, properties = _kafka()
        (letter,) = letters.read(properties, letters.select(settings, ids=[letter_id]))
        if save:
            letters.save(letter, save)
    except (letters.CallError, SettingsError, Outage, OSError) as error:
        _refuse(error)
    console.print(letters.description(letter), markup=False, highlight=False, soft_wrap=True)


@letters_app.command("replay")
def letters_replay(
    letter_ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="These alone.")] = None,
    topic: OfTopic = None,
    reason: OfReason = "",
    since: Since = None,
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", help="Also if they are more than 1,000.")] = False,
    value: Annotated[Path | None, typer.Option(help="A file with what the one ID's value should have been.")] = None,
) -> None:
    """Put dead letters back on their topic, each exactly once; those put back before are left alone."""
    from fraudctl import letters

    try:
        filtered = bool(topic or reason or since or limit)
        if letter_ids and filtered:
            raise letters.CallError("either IDs or filters, not both")
        if value and len(letter_ids or []) != 1:
            raise letters.CallError("--value is for exactly one ID")
        mended = value.read_bytes() if value else None
        settings, properties = _kafka()
        selection = letters.select(settings, ids=letter_ids or [], topic=topic, reason=reason, since=since)
        done = letters.replay(properties, selection, limit=limit, more=yes, mended=mended)
    except letters.Fenced as error:
        _refuse(error, exit_code=1)
    except (letters.CallError, SettingsError, Outage, OSError) as error:
        _refuse(error)
    skipped = f"; {done.skipped:,} were put back before" if done.skipped else ""
    console.print(f"put back: {letters.counted(done.put_back)}{skipped}", highlight=False, soft_wrap=True)


def _kafka() -> tuple[ServiceSettings, dict[str, str]]:
    settings = load(ServiceSettings)
    return settings, kafka_properties(settings)


def _refuse(error: Exception, *, exit_code: int = 2) -> NoReturn:
    reason = str(error)
    if isinstance(error, OSError) and error.filename:
        reason = f"{error.filename}: {error.strerror}"
    sys.stderr.write(f"fraudctl: {reason}\n")
    raise typer.Exit(exit_code)


def main() -> None:
    """The entry point."""
    logging.getLogger("librdkafka").addHandler(logging.NullHandler())  # errors come back as such
    app()


if __name__ == "__main__":
    main()
