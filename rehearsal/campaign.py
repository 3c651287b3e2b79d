"""Runs the whole pipeline on a real Apache Kafka while parts of the pipeline are killed or stopped, or misbehave.

Each scenario streams transactions at a steady rate, injects faults that depend on the seed, and repairs everything.
When all transactions are processed, the scenario draws up the ledger and checks every guarantee for every transaction.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rehearsal import demo
from rehearsal.demo import Options, Scene
from rehearsal.faults import Run
from rehearsal.ledger import Ledger
from rehearsal.scenarios import SCENARIOS
from sandbox.apache import ApacheKafka
from sandbox.postgres import Postgres

__all__ = ["SCENARIOS", "Result", "broken_promises", "campaign", "show"]

_RATE = 250.0  # transactions per second
_FRAUD_RATE = 0.02
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a scenario. `broken` has one line for each guarantee that did not hold."""

    scenario: str
    seed: int
    ledger: Ledger
    kills: Mapping[str, int]
    faults: Mapping[str, int]
    rubbish: int
    evictions: int
    figures: Mapping[str, int]
    broken: Sequence[str]

    def report(self) -> dict[str, object]:
        """Return the outcome as an entry of the report file."""
        named = {
            name: getattr(self, name) for name in ("scenario", "seed", "rubbish", "evictions", "figures", "broken")
        }
        return named | {"kills": dict(self.kills), "faults": dict(self.faults)} | self.ledger.report()


def campaign(
    names: Sequence[str], *, seed: int, minutes: float | None, work_dir: Path, console: Console
) -> Iterator[Result]:
    """Run these scenarios one after another, and yield the outcome of each scenario.

    Raises StandInError if a process fails, Outage if Kafka does not respond, and SettingsError for invalid settings.
    """
    for name in names:
        console.print(f"[bold]{name}[/bold], seed {seed}", highlight=False)
        yield _play(name, seed=seed, minutes=minutes, work_dir=work_dir / name, console=console)


def _play(name: str, *, seed: int, minutes: float | None, work_dir: Path, console: Console) -> Result:
    scenario = SCENARIOS[name]
    runs = []

    def steps(scene: Scene) -> Iterator[None]:
        yield  # the services start now
        seconds = 60 * (scenario.minutes if minutes is None else minutes)
        run = Run(
            scene=scene,
            broker=cast(ApacheKafka, scene.stack.broker),  # never None, because the options below start both
            database=cast(Postgres, scene.stack.database),
            dice=random.Random(f"{name} {seed}"),  # noqa: S311 - only chooses faults
            rate=_RATE,
            ends=time.monotonic() + seconds,
            least_kills=scenario.least_kills if minutes is None else 0,
            work_dir=work_dir,
        )
        runs.append(run)
        yield from scenario.faults(run)
        scene.enough.set()

    options = Options(
        transactions=None,
        rate=_RATE,
        source=None,
        fraud_rate=_FRAUD_RATE,
        broker="apache",
        database=None,
        work_dir=work_dir,
        environment=scenario.environment,
        confirmed=True,
    )
    ledger = demo.run(options, console, scenario=steps)
    (run,) = runs
    logs = [path.read_text(errors="replace") for path in sorted((work_dir / "logs").glob("*.log"))]
    return Result(
        scenario=name,
        seed=seed,
        ledger=ledger,
        kills=run.kills,
        faults=run.faults,
        rubbish=len(run.rubbish),
        evictions=sum(log.count("MAXPOLL") for log in logs),
        figures=run.figures,
        broken=[*broken_promises(run, ledger, logs), *scenario.broken(run, ledger)],
    )


def broken_promises(run: Run, ledger: Ledger, logs: Sequence[str]) -> list[str]:
    """Return one line for each guarantee that did not hold, with the identities of the affected transactions."""
    broken = [f"{what}: {_some(identities)}" for what, identities in ledger.suspects.items()]
    if ledger.mailed_frauds != ledger.predicted_frauds and not broken:
        broken.append(f"{ledger.mailed_frauds} of {ledger.predicted_frauds} frauds mailed")
    if ledger.repeated_mails > run.kills["alerter"]:
        broken.append(
            f"{ledger.repeated_mails} mails repeated, but the alerter was killed {run.kills['alerter']} times"
        )
    letters_of = ledger.dead_letter_places
    without = run.rubbish - letters_of.keys()
    answers = {refusal for refusal in without if refusal[0] == "producer"}
    if len(answers) <= run.kills["producer"]:  # a producer that was killed may not have read its last answer
        without -= answers
    for what, places in {
        "rubbish without a dead letter": without,
        "records with several dead letters": {place for place, letters in letters_of.items() if len(letters) > 1},
        "valid records in the dead letters": letters_of.keys() - run.rubbish,
    }.items():
        if places:
            broken.append(f"{what}: {_some(sorted(places))}")
    for sign, what in (("MAXPOLL", "a consumer was evicted"), ("Traceback", "a service logged a traceback")):
        if any(sign in log for log in logs):
            broken.append(what)
    return broken


def _some(identities: Sequence[tuple[object, ...]]) -> str:
    shown = ", ".join(" ".join(map(str, identity)) for identity in identities[:_SHOWN])
    return f"{len(identities)}: {shown}{', ...' if len(identities) > _SHOWN else ''}"


def show(result: Result, console: Console) -> None:
    """Print the outcome of a scenario."""
    ledger = result.ledger
    table = Table(title=f"{result.scenario}, seed {result.seed}", show_header=False)
    table.add_row("transactions", f"{ledger.served:,}")
    table.add_row("lost / duplicated / out of order", f"{ledger.lost} / {ledger.duplicates} / {ledger.out_of_order}")
    table.add_row(
        "frauds / mailed / mails repeated",
        f"{ledger.predicted_frauds} / {ledger.mailed_frauds} / {ledger.repeated_mails}",
    )
    table.add_row("rows", f"{ledger.rows:,}")
    table.add_row("rubbish / dead letters", f"{result.rubbish} / {ledger.dead_letters}", end_section=True)
    for name, times in result.kills.items():
        table.add_row(f"{name} killed", str(times))
    for what, figure in (*result.faults.items(), *result.figures.items()):
        table.add_row(what, str(figure))
    console.print(table)
    for line in result.broken:
        console.print(f"[bold red]broken:[/bold red] {escape(line)}", soft_wrap=True)
    if not result.broken:
        console.print("[bold green]Every promise held.")
