"""fraudctl, the operator's command line. Exit codes: 0 done, 1 something is wrong, 2 the call or a setting is."""

import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from fraudctl.call import CallError, parse_since
from shared.errors import Outage, SettingsError
from shared.kafka import topics
from shared.privacy import without_credentials
from shared.settings import RegistrySettings, ServiceSettings, kafka_properties, load

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from fraudctl.labels import Label
    from training.aliases import Alias

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
topics_app = typer.Typer(no_args_is_help=True, help="The topics and their dead-letter topics.")
app.add_typer(topics_app, name="topics")
letters_app = typer.Typer(no_args_is_help=True, help="What the services refused: see it, mend it, put it back.")
app.add_typer(letters_app, name="dead-letters")
labels_app = typer.Typer(no_args_is_help=True, help="What people found out about transactions.")
app.add_typer(labels_app, name="labels")
console = Console()
_REDRAWN_S = 2.0

OfTopic = Annotated[str | None, typer.Option("--topic", help="Only those of this topic.")]
OfReason = Annotated[str, typer.Option("--reason", help="Only those whose reason contains this.")]
Since = Annotated[str | None, typer.Option(help="Only those since a time (UTC, 2026-01-31T21:30) or for 90m, 2h, 3d.")]
Limit = Annotated[int | None, typer.Option(min=1, help="No more than these many, the oldest.")]
ModelName = Annotated[str | None, typer.Option("--name", help="Registered model; without it, MODEL_NAME.")]
ModelAlias = Annotated[str | None, typer.Option("--alias", help="Alias that a version gets; without it, MODEL_ALIAS.")]
TrackingUri = Annotated[str | None, typer.Option(help="The MLflow registry; without it, MLFLOW_TRACKING_URI.")]


@app.command()
def demo(
    transactions: Annotated[int | None, typer.Option(min=1, help="How many; without it, until Ctrl+C.")] = None,
    rate: Annotated[float, typer.Option(min=0, help="Transactions a second; 0 as fast as it goes.")] = 100.0,
    source: Annotated[Path | None, typer.Option(help="A CSV in the training format; without it, generated.")] = None,
    broker: Annotated[str, typer.Option(help="auto, embedded, apache, HOST:PORT or a client.properties.")] = "auto",
    database: Annotated[str | None, typer.Option(help="URL of a PostgreSQL; without it, one is started.")] = None,
    report: Annotated[Path | None, typer.Option(help="Where the ledger goes as JSON.")] = None,
    work_dir: Annotated[Path | None, typer.Option(help="Where mails, logs, database and registry are kept.")] = None,
    fraud_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of frauds among generated ones.")] = 0.0038,
) -> None:
    """Run everything on this machine, stream transactions through it, and see whether the ledger balances."""
    from rehearsal import demo as runner
    from rehearsal.stack import choose_broker
    from sandbox.payments_api import SourceError, check_source
    from sandbox.processes import StandInError

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
    from rehearsal import campaign as runner
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
    name: ModelName = None,
    alias: ModelAlias = None,
    seed: Annotated[int, typer.Option(help="Of the split, the model and the generator.")] = 1,
    target_precision: Annotated[float, typer.Option(min=0, max=1, help="Of the alarms, on unseen cards.")] = 0.9,
    validated: Annotated[str | None, typer.Option(help="A file or URL of confirmed rows, added to the others.")] = None,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Only if no version has the alias yet.")] = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train a model, measure it on cards it never saw, and register it."""
    from sandbox.generator import training_frame
    from training import aliases
    from training import train as training

    of = _alias(name, alias, tracking_uri)
    sources = [*(data or []), *(more or [])]
    try:
        if if_absent and (present := aliases.bearer(of)):
            console.print(f"{of.name} version {present} is {of.alias} already")
            return
        frame = training.read(sources) if sources else training_frame(seed=seed)
        if validated:
            frame = training.together(frame, training.read([validated]))
        trained = training.fit(frame, seed=seed, target_precision=target_precision)
        version = training.register(trained, of)
    except (Outage, OSError, ValueError) as error:
        _refuse(error)
    console.print(f"{of.name} version {version} is {of.alias} now")
    table = Table("measure", f"on {trained.held_out}")
    for measure, value in {**trained.metrics, "threshold": trained.threshold}.items():
        table.add_row(measure.replace("_", " "), f"{value:.4f}".removesuffix(".0000"))
    console.print(table)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="Of the registered model.")],
    name: ModelName = None,
    alias: ModelAlias = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Give the alias to a version that passes a smoke prediction, and show how it compares with the one before it."""
    from fraudctl import models
    from services.predictor.model import UnusableModel
    from training.aliases import NoSuchVersion

    of = _alias(name, alias, tracking_uri)
    try:
        candidate, champion = models.promote(of, version)
    except (NoSuchVersion, UnusableModel, Outage) as error:
        _refuse(error)
    console.print(models.comparison(candidate, champion))
    console.print(f"{of.name} version {version} is {of.alias} now")


@app.command()
def rollback(name: ModelName = None, alias: ModelAlias = None, tracking_uri: TrackingUri = None) -> None:
    """Give the alias back to the version that had it before."""
    from training import aliases

    of = _alias(name, alias, tracking_uri)
    try:
        version = aliases.move_back(of)
    except (aliases.NoSuchVersion, Outage) as error:
        _refuse(error)
    console.print(f"{of.name} version {version} is {of.alias} again")


def _alias(name: str | None, alias: str | None, tracking_uri: str | None) -> "Alias":
    """The alias that is meant, by the options or else the settings; MLflow told not to try for minutes, in silence."""
    from training.aliases import Alias

    options = {"mlflow_tracking_uri": tracking_uri, "model_name": name, "model_alias": alias}
    try:
        settings = load(RegistrySettings, **{option: value for option, value in options.items() if value})
    except SettingsError as error:
        _refuse(error)
    settings.log_in()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    return Alias(settings.mlflow_tracking_uri, settings.model_name, settings.model_alias)


@topics_app.command("create")
def topics_create(
    partitions: Annotated[int, typer.Option(min=1, help="Of each new topic.")] = topics.PARTITIONS,
    replication: Annotated[int | None, typer.Option(min=1, help="Of each new topic; without it, up to 3.")] = None,
) -> None:
    """Create what is missing; nothing that exists is changed."""
    try:
        settings, properties = _kafka()
        created = [
            name
            for names, letters in _topics(settings)
            for name in topics.create(
                properties, names, partitions=partitions, replication=replication, letters=letters
            )
        ]
    except (SettingsError, Outage) as error:
        _refuse(error)
    console.print(f"created: {', '.join(created)}" if created else "all topics are there")


@topics_app.command("check")
def topics_check(
    partitions: Annotated[int, typer.Option(min=1, help="That each topic should have at least.")] = topics.PARTITIONS,
) -> None:
    """Say what is not as it should be, with the remedy; nothing is changed. Exit 1 if something is not."""
    try:
        settings, properties = _kafka()
        problems = [
            problem
            for names, letters in _topics(settings)
            for problem in topics.check(properties, names, partitions=partitions, letters=letters)
        ]
    except (SettingsError, Outage) as error:
        _refuse(error)
    for line in problems or ["all topics are as they should be"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(int(bool(problems)))


def _topics(settings: ServiceSettings) -> list[tuple[list[str], bool]]:
    """The topics, and whether they have dead letters."""
    return [([settings.topic_1, settings.topic_2], True), ([settings.challenger_topic], False)]


@app.command("status")
def status_command(
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until Ctrl+C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Where everything stands; exit 1 if something is not healthy."""
    from rich.live import Live

    from fraudctl import status

    try:
        if watch and as_json:
            raise CallError("either --watch or --json")
        _be_brief_with_mlflow()
        settings = status.settings()
        now = status.look(settings)
        if watch:
            with Live(status.show(now), console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
                while True:
                    time.sleep(_REDRAWN_S)
                    now = status.look(settings)
                    live.update(status.show(now), refresh=True)
    except (CallError, SettingsError) as error:
        _refuse(error)
    if as_json:
        sys.stdout.write(json.dumps(now.report()) + "\n")
    elif not watch:
        console.print(status.show(now), soft_wrap=True)
    raise typer.Exit(int(bool(now.problems)))


@app.command("doctor")
def doctor_command() -> None:
    """Try everything that the services need, and name the remedy where it fails; exit 1 if something does."""
    from fraudctl import doctor

    _be_brief_with_mlflow()
    findings = doctor.examine()
    for finding in findings:
        console.print(str(finding), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(int(any(finding.verdict == "failed" for finding in findings)))


@app.command("tail")
def tail_command(
    topic: Annotated[str, typer.Argument(help="Any, dead letters' among them.")],
    follow: Annotated[bool, typer.Option("--follow", help="Those that come from now on, until Ctrl+C.")] = False,
    count: Annotated[int, typer.Option(min=1, help="How many of the last ones.")] = 10,
) -> None:
    """Show records, without card numbers and birth dates."""
    from fraudctl import tail

    try:
        _, properties = _kafka()
        with suppress(KeyboardInterrupt):
            shown = tail.follow(properties, topic, tell=_tell) if follow else tail.last(properties, topic, count)
            for message in shown:
                console.print(tail.description(message), markup=False, highlight=False, soft_wrap=True)
    except (CallError, SettingsError, Outage) as error:
        _refuse(error)


def _be_brief_with_mlflow() -> None:
    """Have MLflow try once and for a short while, unless it is told otherwise: somebody is waiting."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"


@app.command("migrate")
def migrate_command() -> None:
    """Bring the database's tables to their newest version, as their owner."""
    from services.db_sink.table import migrate

    try:
        migrate(_database())
    except (SettingsError, Outage) as error:
        _refuse(error)
    console.print("the tables are up to date")


@letters_app.command("list")
def letters_list(topic: OfTopic = None, reason: OfReason = "", since: Since = None, limit: Limit = None) -> None:
    """List dead letters, the oldest first."""
    from fraudctl import letters

    try:
        settings, properties = _kafka()
        selection = letters.select(settings, topic=topic, reason=reason, since=since)
        found = letters.read(properties, selection)[:limit]
    except (CallError, SettingsError, Outage) as error:
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
    except (CallError, SettingsError, Outage, OSError) as error:
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
            raise CallError("either IDs or filters, not both")
        if value and len(letter_ids or []) != 1:
            raise CallError("--value is for exactly one ID")
        mended = value.read_bytes() if value else None
        settings, properties = _kafka()
        selection = letters.select(settings, ids=letter_ids or [], topic=topic, reason=reason, since=since)
        done = letters.replay(properties, selection, limit=limit, more=yes, mended=mended)
    except letters.Fenced as error:
        _refuse(error, exit_code=1)
    except (CallError, SettingsError, Outage, OSError) as error:
        _refuse(error)
    skipped = f"; {done.skipped:,} were put back before" if done.skipped else ""
    console.print(f"put back: {letters.counted(done.put_back)}{skipped}", highlight=False, soft_wrap=True)


@labels_app.command("confirm")
def labels_confirm(
    trans_num: Annotated[str, typer.Argument(help="Of the transaction, as its alarm names it.")],
    fraud: Annotated[str, typer.Option(help="yes or no.")],
    by: Annotated[str, typer.Option(help="Who found out.")],
    unix_time: Annotated[int | None, typer.Option(min=0, max=10**12, help="Which, if it came several times.")] = None,
    overrule: Annotated[bool, typer.Option("--overrule", help="Also if somebody confirmed the contrary.")] = False,
) -> None:
    """Say whether a transaction was fraud."""
    from fraudctl import labels

    try:
        if not by.strip():
            _refuse(CallError("--by: who?"))
        label = labels.Label(trans_num, labels.fraud_or_not(fraud), by.strip(), unix_time)
    except ValueError:
        _refuse(CallError(f"--fraud: expected yes or no, not {fraud!r}"))
    _confirm([label], overrule=overrule)


@labels_app.command("import")
def labels_import(
    file: Annotated[Path, typer.Argument(help="A CSV: trans_num, is_fraud and, if needed, unix_time and by.")],
    by: Annotated[str | None, typer.Option(help="Who found out, where the file does not say.")] = None,
    overrule: Annotated[bool, typer.Option("--overrule", help="Also if somebody confirmed the contrary.")] = False,
) -> None:
    """Take in the labels of a file, all or none."""
    from fraudctl import labels

    try:
        given = labels.read(file, by=by)
    except (CallError, OSError, UnicodeDecodeError) as error:
        _refuse(error)
    _confirm(given, overrule=overrule)


@labels_app.command("list")
def labels_list(
    unreviewed: Annotated[bool, typer.Option("--unreviewed", help="Only those that nobody confirmed.")] = False,
    predicted_fraud: Annotated[bool, typer.Option("--predicted-fraud", help="Only those called fraud.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="No more than these many, the newest.")] = 50,
) -> None:
    """List transactions and their labels, the newest first."""
    from fraudctl import labels

    try:
        found = labels.newest(_database(), unreviewed=unreviewed, predicted_fraud=predicted_fraud, limit=limit)
    except (SettingsError, Outage) as error:
        _refuse(error)
    console.print(found)


@labels_app.command("stats")
def labels_stats() -> None:
    """How each model version did on the confirmed rows."""
    from fraudctl import labels

    try:
        found = labels.performance(_database())
    except (SettingsError, Outage) as error:
        _refuse(error)
    table = Table("model", "confirmed", "of them frauds", "precision", "recall")
    for each in found:
        precision, recall = ("" if share is None else f"{share:.3f}" for share in (each.precision, each.recall))
        table.add_row(each.model, f"{each.confirmed:,}", f"{each.frauds:,}", precision, recall)
    console.print(table if found else "no transaction is confirmed yet")


def _confirm(given: "Sequence[Label]", *, overrule: bool) -> None:
    from fraudctl import labels

    try:
        done = labels.confirm(_database(), given, overrule=overrule)
    except (CallError, SettingsError, Outage) as error:
        _refuse(error)
    before = f"; {done.confirmed_before:,} were confirmed like that before" if done.confirmed_before else ""
    console.print(f"confirmed: {done.changed:,}{before}", highlight=False)


@app.command("export")
def export_command(
    out: Annotated[str, typer.Option(help="A file, or s3://BUCKET/KEY.")] = "validated.csv",
    since: Annotated[str | None, typer.Option(help="From this time on (UTC), or of the last 90m, 2h, 3d.")] = None,
    until: Annotated[str | None, typer.Option(help="Before this time.")] = None,
    append: Annotated[bool, typer.Option("--append", help="To what the file has already, without repeats.")] = False,
) -> None:
    """Write the confirmed transactions as a training file."""
    from rich.progress import Progress

    from fraudctl import export

    now_ms = time.time_ns() // 1_000_000
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("confirmed rows", total=None)
        try:
            begin, end = (
                None if text is None else parse_since(text, now_ms=now_ms, option=option) // 1000
                for text, option in ((since, "--since"), (until, "--until"))
            )
            written = export.export(
                _database(),
                out,
                since=begin,
                until=end,
                append=append,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except (CallError, SettingsError, Outage, OSError) as error:
            _refuse(error)
    console.print(f"{out}: {written:,} rows", highlight=False, soft_wrap=True)


@app.command("alert-test")
def alert_test() -> None:
    """Send a sample alarm through each channel that is configured; exit 1 if one of them did not take it."""
    from services.alerter.channels import configured
    from services.alerter.settings import AlerterSettings
    from shared.errors import Poison

    try:
        channels = configured(load(AlerterSettings))
    except SettingsError as error:
        _refuse(error)
    failed = False
    for channel in channels:
        try:
            channel.test()
            console.print(f"{channel.name}: accepted", highlight=False)
        except (Outage, Poison) as error:
            failed = True
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        channel.close()
    raise typer.Exit(int(failed))


def _database() -> "Engine":
    from services.db_sink.settings import DatabaseSettings
    from services.db_sink.table import connect

    try:
        return connect(load(DatabaseSettings).database_url.get_secret_value())
    except ValueError as error:
        raise SettingsError(f"DATABASE_URL: {error}") from None


def _kafka() -> tuple[ServiceSettings, dict[str, str]]:
    settings = load(ServiceSettings)
    return settings, kafka_properties(settings)


def _refuse(error: Exception, *, exit_code: int = 2) -> NoReturn:
    reason = str(error)
    if isinstance(error, OSError) and error.filename:
        reason = f"{error.filename}: {error.strerror}"
    _tell(reason)
    raise typer.Exit(exit_code)


def _tell(reason: str) -> None:
    sys.stderr.write(f"fraudctl: {without_credentials(reason)}\n")


def main() -> None:
    """The entry point."""
    logging.getLogger("librdkafka").addHandler(logging.NullHandler())  # errors come back as such
    app()


if __name__ == "__main__":
    main()
