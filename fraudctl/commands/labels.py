"""The commands `labels confirm`, `labels import`, `labels list`, `labels stats` and `export`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fraudctl.call import CallError, parse_since
from fraudctl.cli import Commands, console, say

if TYPE_CHECKING:
    from fraudctl.labels import Label

commands = Commands(help="Confirm, import and review fraud labels.")
export_commands = Commands()

Overwrite = Annotated[bool, typer.Option("--overrule", help="Overwrite a conflicting label.")]


@commands.add("confirm", "labels confirm 3cb54a489fb351f73a7db98f6c7bb1ad \\\n      --fraud yes --by ana")
def confirm(
    trans_num: Annotated[str, typer.Argument(metavar="TRANS_NUM", help="Transaction number, as shown in the alarm.")],
    fraud: Annotated[str, typer.Option(metavar="yes|no", help="Whether the transaction was fraud.")],
    by: Annotated[str, typer.Option(metavar="NAME", help="Reviewer's name.")],
    unix_time: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS", min=0, max=10**12, help="unix_time of the transaction, if TRANS_NUM is not unique."
        ),
    ] = None,
    overrule: Overwrite = False,
) -> None:
    """Label a transaction as fraud or as legitimate."""
    from fraudctl import labels

    if not by.strip():
        raise CallError("--by: the reviewer's name is empty")
    try:
        is_fraud = labels.fraud_or_not(fraud)
    except ValueError:
        raise CallError(f"--fraud: expected yes or no, not {fraud!r}") from None
    _confirm([labels.Label(trans_num, is_fraud, by.strip(), unix_time)], overrule=overrule)


@commands.add("import", "labels import reviewed.csv --by ana")
def import_file(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="CSV file with the columns trans_num and is_fraud. Optional columns: by (the reviewer) and unix_time.",
        ),
    ],
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Reviewer's name, for rows that do not name a reviewer.")
    ] = None,
    overrule: Overwrite = False,
) -> None:
    """Import all labels from a CSV file, or none of them if any label is invalid."""
    from fraudctl import labels

    _confirm(labels.read(file, by=by), overrule=overrule)


@commands.add("list", "labels list --unreviewed --predicted-fraud")
def show_list(
    unreviewed: Annotated[
        bool, typer.Option("--unreviewed", help="Only transactions without a confirmed label.")
    ] = False,
    predicted_fraud: Annotated[
        bool, typer.Option("--predicted-fraud", help="Only transactions predicted as fraud.")
    ] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most N transactions, newest first.")] = 50,
) -> None:
    """List transactions and their labels, newest first."""
    from fraudctl import labels

    console.print(labels.newest(labels.engine(), unreviewed=unreviewed, predicted_fraud=predicted_fraud, limit=limit))


@commands.add("stats", "labels stats")
def show_stats() -> None:
    """Show each model version's precision and recall on confirmed rows."""
    from rich.table import Table

    from fraudctl import labels

    found = labels.performance(labels.engine())
    table = Table("model", "confirmed", "frauds", "precision", "recall")
    for each in found:
        precision, recall = ("" if share is None else f"{share:.3f}" for share in (each.precision, each.recall))
        table.add_row(each.model, f"{each.confirmed:,}", f"{each.frauds:,}", precision, recall)
    console.print(table if found else "no transaction has a confirmed label yet")


def _confirm(given: "Sequence[Label]", *, overrule: bool) -> None:
    from fraudctl import labels

    done = labels.confirm(labels.engine(), given, overrule=overrule)
    before = f"; {done.confirmed_before:,} already had that label" if done.confirmed_before else ""
    console.print(f"confirmed: {done.changed:,}{before}", highlight=False)


@export_commands.add("export", "export --out validated.csv --append", "export --out s3://bucket/march.csv --since 30d")
def export_confirmed(
    out: Annotated[str, typer.Option(metavar="FILE", help="Output file, or s3://BUCKET/KEY.")] = "validated.csv",
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Only rows since this UTC time (2026-01-31T21:30), or newer than this age (90m, 2h, 3d).",
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only rows before this UTC time, or older than this age.")
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Keep the rows of the existing file, and remove repeated rows.")
    ] = False,
) -> None:
    """Export confirmed transactions as a training file."""
    from rich.console import Console
    from rich.progress import Progress

    from fraudctl import export, labels

    now_ms = time.time_ns() // 1_000_000
    begin, end = (
        None if text is None else parse_since(text, now_ms=now_ms, option=option) // 1000
        for text, option in ((since, "--since"), (until, "--until"))
    )
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("confirmed rows", total=None)
        written = export.export(
            labels.engine(),
            out,
            since=begin,
            until=end,
            append=append,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    say(f"{out}: {written:,} rows")
