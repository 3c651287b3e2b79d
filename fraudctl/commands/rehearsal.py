"""The commands demo and chaos."""

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fraudctl.call import CallError, refusing
from fraudctl.cli import Commands, console, say

commands = Commands()

WorkDir = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder for logs, mails and data. Default: a temporary folder."),
]
Report = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results to a JSON file.")]


@commands.add("demo", "demo --transactions 3000 --rate 500", "demo --source fraudTest.csv --rate 0")
def demo(
    transactions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of transactions. Default: until Ctrl+C.")
    ] = None,
    rate: Annotated[
        float, typer.Option(metavar="N", min=0, help="Transactions per second; 0 means as fast as possible.")
    ] = 100.0,
    source: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV file in the training format. Default: generated transactions."),
    ] = None,
    broker: Annotated[
        str,
        typer.Option(
            metavar="BROKER", help="Broker to use: auto, embedded, apache, HOST:PORT or a client.properties file."
        ),
    ] = "auto",
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="PostgreSQL database to use. Default: a temporary database.")
    ] = None,
    report: Report = None,
    work_dir: WorkDir = None,
    fraud_rate: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Share of frauds among generated transactions.")
    ] = 0.0038,
) -> None:
    """Run the whole flow locally and account for every record.

    Exits with 1 if a record is lost, duplicated or unaccounted for.
    """
    from rehearsal import demo as runner
    from rehearsal.stack import choose_broker
    from sandbox.payments_api import SourceError, check_source
    from sandbox.processes import StandInError

    with _directory(work_dir) as directory, refusing(SourceError, StandInError):
        if source:
            check_source(source)
        if report:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.touch()
        kind, description = choose_broker(broker)
        say(f"broker: {description}")
        options = runner.Options(
            transactions=transactions,
            rate=rate,
            source=source,
            fraud_rate=fraud_rate,
            broker=kind,
            database=database,
            work_dir=directory,
        )
        ledger = runner.run(options, console)
    runner.show(ledger, console)
    if report:
        report.write_text(json.dumps(ledger.report(), indent=2) + "\n")
    raise typer.Exit(0 if ledger.balanced else 1)


@commands.add("chaos", "chaos --scenario kill-predictor", "chaos --seed 7 --minutes 10 --report chaos.json")
def chaos(
    more: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="More scenarios to run.")] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Scenario to run (repeatable). Default: all.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed for the injected faults. Default: random.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="N", min=0, help="Minutes that each scenario runs. Default: the scenario's own length."),
    ] = None,
    report: Report = None,
    work_dir: WorkDir = None,
) -> None:
    """Break components under load and check every guarantee.

    Runs on Apache Kafka. Stops after the first scenario in which a guarantee does not hold, and exits with 1.
    """
    from rehearsal import campaign as runner
    from sandbox.processes import StandInError

    names = [*(scenario or []), *(more or [])] or list(runner.SCENARIOS)
    if unknown := [name for name in names if name not in runner.SCENARIOS]:
        known = ", ".join(runner.SCENARIOS)
        raise CallError(f"--scenario: there is no scenario {', '.join(unknown)}. Choose from: {known}")
    chosen = random.randrange(10**6) if seed is None else seed  # noqa: S311 - not used for security
    results = []
    with _directory(work_dir) as directory, refusing(StandInError):
        for result in runner.campaign(names, seed=chosen, minutes=minutes, work_dir=directory, console=console):
            results.append(result)
            runner.show(result, console)
            if report:
                report.write_text(json.dumps([each.report() for each in results], indent=2) + "\n")
            if result.broken:
                raise typer.Exit(1)


@contextmanager
def _directory(wanted: Path | None) -> Iterator[Path]:
    """Yield the wanted folder, after creating it if necessary.

    If `wanted` is None, yields a temporary folder, which is deleted at the end.
    """
    if wanted:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will contain card numbers and birth dates
        yield wanted.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fraud-alarm-") as temporary:
        yield Path(temporary).resolve()
