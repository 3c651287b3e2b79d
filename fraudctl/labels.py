"""Stores labels that reviewers confirm. These labels replace the source's labels, and every change is recorded."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psycopg2
import sqlalchemy as sa
from psycopg2.extras import execute_values
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.exc import SQLAlchemyError

from fraudctl.call import CallError
from services.db_sink.settings import DatabaseSettings
from services.db_sink.table import connect, reason
from shared.errors import Outage, SettingsError
from shared.privacy import mask_card
from shared.settings import load

_YES, _NO = ("1", "yes", "true"), ("0", "no", "false")
_MAX_TIMES = 5  # number of times to show for an ambiguous trans_num
_LOCK = 4_120_937_718  # an arbitrary number for an advisory lock; locking the table would require more privileges


class Label(NamedTuple):
    """A reviewer's label of a transaction. `unix_time` distinguishes transactions with the same trans_num."""

    trans_num: str
    is_fraud: bool
    by: str
    unix_time: int | None = None
    line: int | None = None  # line number in the imported file


class Done(NamedTuple):
    """The number of labels that were changed, and the number of transactions that already had the given label."""

    changed: int
    confirmed_before: int


@dataclass(frozen=True)
class Performance:
    """A model version's precision and recall on the confirmed rows that it predicted."""

    model: str
    confirmed: int
    frauds: int
    precision: float | None  # share of the version's alarms that were fraud
    recall: float | None  # share of the frauds that the version found


def read(path: Path, *, by: str | None) -> list[Label]:
    """Read labels from a CSV file with the columns `trans_num` and `is_fraud`, and optionally `unix_time` and `by`.

    Raises OSError if the file cannot be read, and CallError if it is invalid. The message of the CallError has a line
    for each invalid row.
    """
    problems: list[str] = []
    labels: list[Label] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if absent := [name for name in ("trans_num", "is_fraud") if name not in (rows.fieldnames or [])]:
                raise CallError(f"{path} lacks the columns {', '.join(absent)}")
            for row in rows:
                try:
                    labels.append(_label(row, by=by, line=rows.line_num))
                except ValueError as error:
                    problems.append(f"line {rows.line_num}: {error}")
    except csv.Error as error:
        raise CallError(f"{path}, line {rows.line_num}, is not CSV: {error}") from None
    except UnicodeDecodeError:
        raise CallError(f"{path} is not UTF-8 text") from None
    if problems:
        raise CallError(_rejection(problems))
    if not labels:
        raise CallError(f"{path} has no labels")
    return labels


def fraud_or_not(text: str) -> bool:
    """Return True for yes, true and 1, and False for no, false and 0. Raises ValueError for any other text."""
    if (answer := text.strip().lower()) not in (*_YES, *_NO):
        raise ValueError(f"is_fraud: expected 0 or 1, not {answer[:20]!r}")
    return answer in _YES


def confirm(engine: sa.Engine, labels: Sequence[Label], *, overrule: bool = False) -> Done:
    """Write all labels or none, and record the previous labels in label_changes.

    Raises CallError if transactions are unknown or ambiguous. Without `overrule`, also raises CallError if transactions
    already have a different confirmed label. The message lists every problem. Raises Outage if the database fails.
    """
    with transaction(engine) as connection:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})  # serializes confirmations
        connection.execute(sa.text(_GIVEN))
        rows = [(n, each.trans_num, each.unix_time, int(each.is_fraud), each.by) for n, each in enumerate(labels)]
        execute_values(connection.connection.cursor(), "INSERT INTO given VALUES %s", rows, page_size=1000)
        connection.execute(sa.text("ANALYZE given"))
        connection.execute(sa.text(_MATCHED))
        if problems := _problems(connection, labels, overrule=overrule):
            raise CallError(_rejection(problems))
        connection.execute(sa.text(_KEPT))
        changed = connection.execute(sa.text(_WRITTEN)).rowcount
        (confirmed,) = connection.execute(sa.text("SELECT count(DISTINCT (trans_num, unix_time)) FROM matched")).one()
    return Done(changed, confirmed - changed)


_GIVEN = """
CREATE TEMPORARY TABLE given (number int, trans_num text, unix_time bigint, is_fraud smallint, by text) ON COMMIT DROP
"""
_MATCHED = """
CREATE TEMPORARY TABLE matched ON COMMIT DROP AS
SELECT given.number, stored.trans_num, stored.unix_time, given.is_fraud, given.by, stored.is_fraud AS was_fraud,
  stored.validated_at IS NOT NULL AS confirmed, stored.validated_by
FROM given JOIN transactions AS stored USING (unix_time, trans_num)
UNION ALL
SELECT given.number, stored.trans_num, stored.unix_time, given.is_fraud, given.by, stored.is_fraud,
  stored.validated_at IS NOT NULL, stored.validated_by
FROM given JOIN transactions AS stored USING (trans_num) WHERE given.unix_time IS NULL
"""
_LAST = """
SELECT DISTINCT ON (unix_time, trans_num) * FROM matched
WHERE NOT confirmed OR was_fraud IS DISTINCT FROM is_fraud ORDER BY unix_time, trans_num, number
"""
_KEPT = f"""
INSERT INTO label_changes (trans_num, unix_time, was_fraud, was_validated_by, is_fraud, changed_by)
SELECT trans_num, unix_time, was_fraud, validated_by, is_fraud, by FROM ({_LAST}) AS last
"""  # noqa: S608 - contains no user input
_WRITTEN = f"""
UPDATE transactions AS stored SET is_fraud = last.is_fraud, validated_at = clock_timestamp(), validated_by = last.by
FROM ({_LAST}) AS last WHERE stored.unix_time = last.unix_time AND stored.trans_num = last.trans_num
"""  # noqa: S608 - contains no user input


def _problems(connection: sa.Connection, labels: Sequence[Label], *, overrule: bool) -> list[str]:
    found: list[tuple[int, str]] = []
    unknown = "SELECT number FROM given WHERE NOT EXISTS (SELECT FROM matched WHERE matched.number = given.number)"
    for (number,) in connection.execute(sa.text(unknown)):
        label = labels[number]
        at = "" if label.unix_time is None else f" with unix_time {label.unix_time}"
        found.append((number, f"no transaction {label.trans_num}{at}"))
    ambiguous = (
        "SELECT number, array_agg(unix_time ORDER BY unix_time) FROM matched GROUP BY number HAVING count(*) > 1"
    )
    for number, times in connection.execute(sa.text(ambiguous)):
        which = ", ".join(map(str, times[:_MAX_TIMES])) + (", ..." if len(times) > _MAX_TIMES else "")
        found.append(
            (number, f"{labels[number].trans_num} exists {len(times)} times. Add its unix_time, one of {which}.")
        )
    torn = "SELECT max(number) FROM matched GROUP BY unix_time, trans_num HAVING count(DISTINCT is_fraud) > 1"
    for (number,) in connection.execute(sa.text(torn)):
        found.append((number, f"{labels[number].trans_num} is labelled both fraud and not fraud in this import"))
    otherwise = "SELECT number, validated_by, was_fraud FROM matched WHERE confirmed AND was_fraud <> is_fraud"
    if not overrule:
        for number, who, was_fraud in connection.execute(sa.text(otherwise)):
            was = "fraud" if was_fraud else "no fraud"
            found.append(
                (
                    number,
                    f"{labels[number].trans_num} was confirmed as {was} by {who}."
                    " Use --overrule to overwrite this label.",
                )
            )
    lines = ("" if labels[number].line is None else f"line {labels[number].line}: " for number, _ in sorted(found))
    return [line + problem for line, (_, problem) in zip(lines, sorted(found), strict=True)]


def newest(engine: sa.Engine, *, unreviewed: bool, predicted_fraud: bool, limit: int) -> Table:
    """Return a table of the newest transactions, with masked card numbers. Raises Outage."""
    conditions = ["validated_at IS NULL"] * unreviewed + ["prediction = 1"] * predicted_fraud or ["TRUE"]
    query = f"""
        SELECT trans_num, unix_time, trans_date_trans_time, amt, merchant, cc_num, probability, prediction, is_fraud,
          validated_by
        FROM transactions WHERE {" AND ".join(conditions)} ORDER BY unix_time DESC, trans_num LIMIT :limit
    """  # noqa: S608 - contains no user input
    table = Table(Column("transaction", no_wrap=True), "unix_time", "time (UTC)", "amount", "merchant", "card")
    for name in ("probability", "prediction", "label"):
        table.add_column(name)
    with transaction(engine) as connection:
        for row in connection.execute(sa.text(query), {"limit": limit}):
            label = "" if row.is_fraud is None else str(row.is_fraud)
            label += f", by {row.validated_by}" if row.validated_by else ""
            cells = (
                row.trans_num,
                str(row.unix_time),
                str(row.trans_date_trans_time),
                f"{row.amt:,.2f}",
                row.merchant.removeprefix("fraud_"),
                mask_card(int(row.cc_num)),
                "" if row.probability is None else f"{row.probability:.3f}",
                "fraud" if row.prediction else "",
                label,
            )
            table.add_row(*(Text("".join(each if each.isprintable() else " " for each in cell)) for cell in cells))
    return table


def performance(engine: sa.Engine) -> list[Performance]:
    """Return each model version's performance on confirmed rows, most recently used version first. Raises Outage."""
    query = """
        SELECT model_name, model_version, count(*) AS confirmed, sum(is_fraud) AS frauds, sum(prediction) AS alarms,
          sum(is_fraud * prediction) AS right_alarms
        FROM transactions WHERE validated_at IS NOT NULL
        GROUP BY model_name, model_version ORDER BY max(predicted_at) DESC NULLS LAST
    """
    with transaction(engine) as connection:
        return [
            Performance(
                f"{row.model_name} version {row.model_version}" if row.model_name else "unknown",
                row.confirmed,
                row.frauds,
                row.right_alarms / row.alarms if row.alarms else None,
                row.right_alarms / row.frauds if row.frauds else None,
            )
            for row in connection.execute(sa.text(query))
        ]


def engine() -> sa.Engine:
    """Return the SQLAlchemy engine for DATABASE_URL. Raises SettingsError if the URL is invalid."""
    try:
        return connect(load(DatabaseSettings).database_url.get_secret_value())
    except ValueError as error:
        raise SettingsError(f"DATABASE_URL: {error}") from None


@contextmanager
def transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open one database transaction, and yield its connection. Raises Outage if the database fails."""
    try:
        with engine.begin() as connection:
            yield connection
    except (SQLAlchemyError, psycopg2.Error) as error:
        raise Outage(f"database: {reason(error)}") from None


def _label(row: dict[str, str | None], *, by: str | None, line: int) -> Label:
    trans_num, who, at = ((row.get(name) or "").strip() for name in ("trans_num", "by", "unix_time"))
    if not trans_num or "\0" in f"{trans_num}{who}":
        raise ValueError("trans_num is empty")
    if not (who := who or by or ""):
        raise ValueError("the reviewer is missing. Fill in the column `by`, or use --by")
    if at and not (at.isascii() and at.isdigit() and len(at) <= 12):
        raise ValueError(f"unix_time: expected epoch seconds, not {at[:20]!r}")
    return Label(trans_num, fraud_or_not(row["is_fraud"] or ""), who, int(at) if at else None, line)


def _rejection(problems: Sequence[str]) -> str:
    return "no label was changed:\n  " + "\n  ".join(problems)
